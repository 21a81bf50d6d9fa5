"""Tests whether programs in other languages can use Leadrelay by its contracts. Called by .ci/interop.

- proto-schemas/openapi.json and asyncapi.json satisfy their specifications;
- clients in Python and JavaScript publish commands, read events and verify webhooks, before, during and after a rotation of the
  callbacks' secrets;
- schemathesis sends documented and undocumented requests to the HTTP API: no response is a server error, and none is undocumented;
- the endless response of /events, which schemathesis would wait for, is read up to an event, and its errors are checked.

Everything runs on a system of its own, in a temporary directory, with free ports.
"""
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from jsonschema import Draft202012Validator

BIN = Path(sys.executable).parent
HERE = Path(__file__).parent / "clients"
LEADCTL = os.environ["LEADCTL"]
OLD, NEW = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"
# A fixed seed gives the same examples every time. More examples find more, but take longer than a minute.
SEED, EXAMPLES = "1", "25"
# The response of this endpoint never ends, and schemathesis reads responses to their end. events() tests the endpoint.
ENDLESS = "/api/v1/events"


def run(*command, env=None, **options):
    return subprocess.run([str(part) for part in command], check=True, env={**os.environ, **(env or {})}, **options)


def documents():
    print("documents", flush=True)
    run(BIN / "openapi-spec-validator", "proto-schemas/openapi.json")
    run("node", HERE / "asyncapi.mjs", "proto-schemas/asyncapi.json")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def leadctl(env, *arguments, stdin=None):
    done = run(LEADCTL, *arguments, "--json", env=env, input=stdin, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def post(env, path, body):
    request = urllib.request.Request(
        env['LEADRELAY_GATEWAY_URL'] + path, json.dumps(body).encode(),
        {"Authorization": f"Bearer {env['API_KEY']}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def started(directory, up):
    """The variables that the system writes once it is ready."""
    file, deadline = directory / "data" / "stack.env", time.monotonic() + 120
    while not file.exists():
        if up.poll() is not None or time.monotonic() > deadline:
            sys.exit("leadctl up did not come up:\n" + (directory / "up.log").read_text())
        time.sleep(0.1)
    lines = (line.split("=", 1) for line in file.read_text().splitlines() if "=" in line and not line.startswith("#"))
    return {name: value.strip("'\"") for name, value in lines}


def clients(env):
    ports = {"python": free_port(), "javascript": free_port()}

    def apply(secrets):
        spec = {
            "projectId": env["PROJECT_ID"], "name": "interop", "states": [{"name": "new", "kind": "initial"}],
            "callbacks": [
                {"name": name, "url": f"http://127.0.0.1:{port}/", "secrets": secrets} for name, port in ports.items()
            ],
        }
        return leadctl(env, "process", "apply", "-", stdin=json.dumps(spec))["process"]["processId"]

    process_id = apply([OLD])
    new_lead = {"projectId": env["PROJECT_ID"], "processId": process_id, "name": "Ada", "phone": "+14155550123"}
    lead_id = post(env, "/api/v1/leads/initiate", {"lead": new_lead})["_id"]
    for title, secrets in [("before", [OLD]), ("during", [NEW, OLD]), ("after", [NEW])]:
        print(f"clients, {title} a rotation of secrets", flush=True)
        apply(secrets)
        foreign = [secret for secret in (OLD, NEW) if secret not in secrets]
        variables = {"LEAD_ID": lead_id, "TRUSTED": " ".join(secrets), "FOREIGN": " ".join(foreign)}
        variables["NATS_URL"] = env["LEADRELAY_PRODUCER_NATS_URL"]
        run(sys.executable, HERE / "client.py", env={**env, **variables, "PORT": str(ports["python"])})
        run("node", HERE / "client.mjs", env={**env, **variables, "PORT": str(ports["javascript"])})
    return process_id, lead_id


def events(env, lead_id):
    """Checks the endpoint that schemathesis leaves out against the document."""
    print("events", flush=True)
    document = json.loads(Path("proto-schemas/openapi.json").read_text())
    documented = document["paths"][ENDLESS]["get"]["responses"]

    def ask(headers, query=""):
        request = urllib.request.Request(env["LEADRELAY_GATEWAY_URL"] + ENDLESS + query, headers=headers)
        try:
            return urllib.request.urlopen(request, timeout=30)
        except urllib.error.HTTPError as refused:
            return refused

    def described(status):
        answer = documented[str(status)]
        return document["components"]["responses"][answer["$ref"].rsplit("/", 1)[1]] if "$ref" in answer else answer

    def valid(schema, value):
        Draft202012Validator({**schema, "components": document["components"]}).validate(value)

    key = {"Authorization": f"Bearer {env['API_KEY']}"}
    for headers, query, expected in [
        ({}, "", 401), ({"Authorization": "Bearer lr_unknown"}, "", 401), ({**key, "Last-Event-ID": "odd"}, "", 400),
        (key, "?lastEventId=odd", 400), (key, "?lastEventId=a-1&lastEventId=b-2", 400), ({**key, "Last-Event-ID": "gone-1"}, "", 410),
    ]:
        with ask(headers, query) as answer:
            assert answer.status == expected, (headers, query, answer.status)
            assert answer.headers["Content-Type"] == "application/json" and answer.headers["X-Request-Id"]
            valid(described(expected)["content"]["application/json"]["schema"], json.load(answer))
    with ask(key) as answer:
        content = described(answer.status)["content"]["text/event-stream"]
        assert answer.headers["Content-Type"] == "text/event-stream", answer.headers
        for state in (None, "nowhere"):
            post(env, "/api/v1/leads/update", {"leadId": lead_id, "name": "Grace", "targetState": state})
            data = next(line for line in answer if line.startswith(b"data: "))
            event = json.loads(data.removeprefix(b"data: "))
            valid(content["schema"]["contentSchema"], event)
            assert event["success"] == (event["errorCode"] is None) == (state is None), event


def schemathesis(env, directory, process_id, lead_id):
    print("schemathesis", flush=True)
    # Ids that exist, so that not all responses are 404.
    update_id = post(env, "/api/v1/leads/update", {"leadId": lead_id, "name": "Grace"})["updateId"]
    known = {"leadId": lead_id, "updateId": update_id, "processId": process_id, "projectId": env["PROJECT_ID"]}
    # Has a name that schemathesis does not find by itself, because the second run must not use the file.
    config = directory / "known.toml"
    config.write_text("[parameters]\n" + "".join(f'"{name}" = "{value}"\n' for name, value in known.items()))
    checks = (
        "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
        "response_schema_conformance,unsupported_method,ignored_auth"
    )
    for title, options in [("existing ids", ["--config-file", config]), ("other ids", [])]:
        print(f"  {title}", flush=True)
        run(
            BIN / "schemathesis", *options, "--no-color", "run", Path("proto-schemas/openapi.json").resolve(), "--url", env["LEADRELAY_GATEWAY_URL"],
            "--header", f"Authorization: Bearer {env['API_KEY']}", "--exclude-path", ENDLESS, "--checks", checks,
            "--phases", "examples,coverage,fuzzing", "--max-examples", EXAMPLES, "--seed", SEED, "--generation-database", "none",
            "--request-timeout", "20", "--continue-on-failure", "--warnings", "off", cwd=directory,
        )


def main():
    documents()
    with tempfile.TemporaryDirectory(prefix="interop-", ignore_cleanup_errors=True) as directory:
        directory = Path(directory)
        # No rate limits, because all requests use one key.
        env = {"GATEWAY_UPDATE_RATE": "0", "GATEWAY_OTHER_RATE": "0"}
        with open(directory / "up.log", "w") as log:
            up = subprocess.Popen(
                [LEADCTL, "up", "--data-dir", directory / "data"], env={**os.environ, **env}, stdout=log, stderr=log,
            )
        try:
            env = started(directory, up)
            env["PROJECT_ID"] = leadctl(env, "project", "create", "--name", "interop")["projectId"]
            # Without config:write, because generated callbacks would be resolved and pinged.
            scopes = [word for scope in ("leads:read", "leads:write", "config:read") for word in ("--scope", scope)]
            env["API_KEY"] = leadctl(env, "key", "create", "--project", env["PROJECT_ID"], "--name", "interop", *scopes)["apiKey"]
            process_id, lead_id = clients(env)
            events(env, lead_id)
            schemathesis(env, directory, process_id, lead_id)
        finally:
            up.send_signal(signal.SIGTERM)
            up.wait(timeout=60)


main()
