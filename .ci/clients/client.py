"""A third-party producer and receiver: publishes a command and reads its outcome with nats-py, and verifies the webhook with the
reference library of Standard Webhooks. client.mjs does the same in JavaScript.

Environment: NATS_URL of a producer, PROJECT_ID, LEAD_ID, PORT of the callback; TRUSTED and FOREIGN, the secrets that must and must not verify
webhooks, separated by spaces.
"""
import asyncio
import json
import os
import secrets
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Empty, Queue
from threading import Thread

import nats
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

PATIENCE = 30
project, lead = os.environ["PROJECT_ID"], os.environ["LEAD_ID"]
trusted, foreign = os.environ["TRUSTED"].split(), os.environ["FOREIGN"].split()
webhooks = Queue()


class Receiver(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        webhooks.put((dict(self.headers.items()), body))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass


def verifies(secret, headers, body):
    try:
        Webhook(secret).verify(body, {name.lower(): value for name, value in headers.items()})
        return True
    except WebhookVerificationError:
        return False


async def webhook_of(update_id, deadline):
    while True:
        try:
            headers, body = await asyncio.to_thread(webhooks.get, timeout=max(0.01, deadline - time.monotonic()))
        except Empty:
            raise SystemExit(f"no webhook of {update_id}") from None
        if json.loads(body)["updateId"] == update_id:
            return headers, body


async def round_trip(js, events, number):
    """An update over NATS: its outcome, and its webhook."""
    update_id = f"{int(time.time()):08x}" + secrets.token_hex(8)
    update = json.dumps({"leadId": lead, "metadata": {"python": number, "text": "é"}, "userId": "nats-py"}).encode()
    ids = {"Nats-Msg-Id": update_id, "Leadrelay-Update-Id": update_id}
    deadline = time.monotonic() + PATIENCE
    repeated = False
    while True:
        try:
            ack = await js.publish(f"leads.cmd.{project}.update", update, headers=ids)
            break
        except nats.errors.Error:
            # A gateway serves a new project with a short delay. The message id makes the repetition safe.
            repeated = True
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.2)
    assert ack.stream == "LEAD_COMMANDS" and (repeated or not ack.duplicate), ack
    again = await js.publish(f"leads.cmd.{project}.update", update, headers=ids)
    assert again.duplicate, again
    while True:
        message = await events.next_msg(timeout=deadline - time.monotonic())
        event = json.loads(message.data)
        if event["updateId"] == update_id:
            break
    assert message.subject.endswith(".update.succeeded"), message.subject
    assert event["success"] and event["data"]["python"] == number and event["userId"] == "nats-py", event
    headers, body = await webhook_of(update_id, deadline)
    payload = json.loads(body)
    assert payload["data"] == event["data"] and payload["leadId"] == lead and payload["action_type"] == "update", payload
    return headers, body


async def main():
    receiver = ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Receiver)
    Thread(target=receiver.serve_forever, daemon=True).start()
    nc = await nats.connect(os.environ["NATS_URL"])
    js = nc.jetstream()
    # The account of a producer has no JetStream, so this plain subscription receives the services' events.
    events = await nc.subscribe(f"leads.evt.{project}.>")
    # New secrets take effect a moment after they are applied.
    deadline, number = time.monotonic() + PATIENCE, 0
    while True:
        number += 1
        headers, body = await round_trip(js, events, number)
        signatures = {name.lower(): value for name, value in headers.items()}["webhook-signature"].split()
        wrong = [s for s in trusted if not verifies(s, headers, body)] + [s for s in foreign if verifies(s, headers, body)]
        if len(signatures) == len(trusted) and not wrong:
            break
        assert time.monotonic() < deadline, f"{len(signatures)} signatures, {len(wrong)} of the secrets are wrong"
    assert not verifies(trusted[0], headers, body + b" "), "a body that was changed"
    await nc.close()
    receiver.shutdown()
    print(f"  nats-py, standardwebhooks (Python): {number} updates, {len(signatures)} signatures")


asyncio.run(asyncio.wait_for(main(), 2 * PATIENCE))
