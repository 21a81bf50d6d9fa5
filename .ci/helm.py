"""Generates the templates of the Helm chart from the Kustomize components, so that both say the same.

The baseline is the overlay `production`. Each option of the chart is a set of components that are added or removed: its
effect is the difference between two renderings, and becomes a condition at the places where they differ. Values replace
scalars at the paths in `VALUES`. Chart.yaml, values.yaml and _helpers.tpl are written by hand; .ci/deploy.py checks that the
chart renders to the overlays.

    .ci/deploy --write        writes the templates
"""

import json
import os
import pathlib
import re
import subprocess

import yaml

DEPLOY = pathlib.Path("deploy")
CHART = DEPLOY / "helm/leadrelay"
BUILD = pathlib.Path("target/ci/helm")

# The condition of each option, and the components that it removes and adds. The order matters: each option applies to
# the parts of the baseline that the options before it leave.
OPTIONS = [
    ("not .Values.nats.cluster", {"nats-cluster"}, set()),
    (".Values.nats.external", {"nats", "nats-cluster"}, {"external-nats"}),
    (".Values.nats.tls", set(), {"nats-tls"}),
    ("not .Values.backup.postgres", {"backup-postgres"}, set()),
    (".Values.cloudnativePG.enabled", {"external-postgres", "backup-postgres"}, {"cloudnative-pg"}),
    ("not .Values.backup.enabled", {"backup", "backup-postgres"}, set()),
    ("not .Values.audit.enabled", {"audit"}, set()),
    (".Values.console.enabled", set(), {"console"}),
    (".Values.keda.enabled", set(), {"keda"}),
    (".Values.prometheus.enabled", set(), {"prometheus"}),
    (".Values.otlp.enabled", set(), {"otlp"}),
    (".Values.gatewayApi.enabled", set(), {"gateway-api"}),
    (".Values.ingress.enabled", set(), {"ingress"}),
]

# The ConfigMaps with settings, and the values with their contents.
SETTINGS = {
    "leadrelay": "common.config",
    "gateway": "gateway.config",
    "lead-state": "leadState.config",
    "webhook-notifier": "webhookNotifier.config",
    "migrate": "migrate.config",
}
# Settings that depend on an option and still have a separate value.
OWN = {("lead-state", "STREAM_REPLICAS")}

CONTAINER = "spec.template.spec.containers.{}.resources"
VALUES = [
    ("Deployment/gateway", CONTAINER.format("gateway"), "gateway.resources"),
    ("Deployment/lead-state", CONTAINER.format("lead-state"), "leadState.resources"),
    ("Deployment/webhook-notifier", CONTAINER.format("webhook-notifier"), "webhookNotifier.resources"),
    ("Deployment/console", CONTAINER.format("console"), "console.resources"),
    ("Deployment/console", "spec.replicas", "console.replicas"),
    ("ConfigMap/console", "data.CONSOLE_URL", "console.url"),
    ("Deployment/lead-state", "spec.replicas", "leadState.replicas"),
    ("HorizontalPodAutoscaler/gateway", "spec.minReplicas", "gateway.minReplicas"),
    ("HorizontalPodAutoscaler/gateway", "spec.maxReplicas", "gateway.maxReplicas"),
    ("HorizontalPodAutoscaler/webhook-notifier", "spec.minReplicas", "webhookNotifier.minReplicas"),
    ("HorizontalPodAutoscaler/webhook-notifier", "spec.maxReplicas", "webhookNotifier.maxReplicas"),
    ("ScaledObject/webhook-notifier", "spec.minReplicaCount", "webhookNotifier.minReplicas"),
    ("ScaledObject/webhook-notifier", "spec.maxReplicaCount", "webhookNotifier.maxReplicas"),
    ("StatefulSet/nats", CONTAINER.format("nats"), "nats.resources"),
    ("StatefulSet/nats", "spec.volumeClaimTemplates.data.spec.resources.requests.storage", "nats.storage"),
    ("PersistentVolumeClaim/backups", "spec.resources.requests.storage", "backup.storage"),
    ("CronJob/backup", "spec.schedule", "backup.schedule"),
    ("CronJob/audit", "spec.schedule", "audit.schedule"),
    ("Cluster/database", "spec.instances", "cloudnativePG.instances"),
    ("Cluster/database", "spec.storage.size", "cloudnativePG.storage"),
    ("Cluster/database", "spec.walStorage.size", "cloudnativePG.walStorage"),
    ("Cluster/database", "spec.resources", "cloudnativePG.resources"),
    ("HTTPRoute/gateway", "spec.parentRefs", "gatewayApi.parentRefs"),
    ("HTTPRoute/gateway", "spec.hostnames", "gatewayApi.hostnames"),
    ("Ingress/gateway", "spec.ingressClassName", "ingress.className"),
    ("Ingress/gateway", "spec.tls", "ingress.tls"),
    ("Ingress/gateway", "spec.rules.0.host", "ingress.host"),
]
# Images by their name in the components.
IMAGES = {
    "leadrelay": "image",
    "nats": "nats.image",
    "nats-box": "backup.image",
    "postgres": "backup.postgresImage",
    "prometheus-nats-exporter": "prometheus.natsExporterImage",
}
SECRETS = {
    "nats-users": "secrets.natsUsers",
    "nats-tls": "secrets.natsTls",
    "database-app": "secrets.database",
    "database-admin": "secrets.databaseAdmin",
    "database-ca": "secrets.databaseCa",
    "secrets-keys": "secrets.keys",
    "console-key": "secrets.consoleKey",
}

MISSING = object()


class If:
    """One of two subtrees. The baseline is in `otherwise`."""

    def __init__(self, condition, then, otherwise):
        self.condition, self.then, self.otherwise = condition, then, otherwise


class Raw(str):
    """A template expression."""


def value(path):
    return f".Values.{path}"


# Rendering.

def render(name, components):
    """The resources of the production overlay with these components, by kind and name."""
    overlays = DEPLOY / "kubernetes/overlays"
    overlay = yaml.safe_load((overlays / "production/kustomization.yaml").read_text())
    operators = yaml.safe_load((overlays / "production-operators/kustomization.yaml").read_text())
    dir = BUILD / name
    dir.mkdir(parents=True, exist_ok=True)
    images = {image["name"]: image for image in operators["images"] + overlay["images"]}
    # kustomize resolves symbolic links, and target/ may be a symbolic link.
    relative = lambda path: os.path.relpath((DEPLOY / "kubernetes" / path).resolve(), dir.resolve())
    overlay |= {
        "resources": [relative("base")],
        "components": [relative(f"components/{c}") for c in components],
        "images": list(images.values()),
    }
    (dir / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    command = [os.environ["KUBECTL"], "kustomize", str(dir)]
    rendered = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return resources(yaml.safe_load_all(rendered))


def resources(documents):
    """Resources by kind and name, with the hashes of ConfigMaps removed from all names."""
    documents = [d for d in documents if d]
    hashed = {}
    for document in documents:
        name = document["metadata"]["name"]
        if document["kind"] == "ConfigMap" and (plain := re.sub(r"-[a-z0-9]{10}$", "", name)) != name:
            hashed[name] = plain
    documents = replace(documents, lambda text: hashed.get(text, text))
    return {f"{d['kind']}/{d['metadata']['name']}": d for d in documents}


def replace(node, change):
    """A copy with each text changed."""
    if isinstance(node, dict):
        return {key: replace(child, change) for key, child in node.items()}
    if isinstance(node, list):
        return [replace(child, change) for child in node]
    return change(node) if isinstance(node, str) else node


# The tree with conditions.

def combine(tree, off, on, condition):
    """Adds to `tree` the condition at each place where `on` differs from `off`."""
    if off == on:
        return tree
    if isinstance(tree, If):
        return If(tree.condition, tree.then, combine(tree.otherwise, off, on, condition))
    if tree is MISSING:
        return tree
    if isinstance(off, dict) and isinstance(on, dict):
        combined = {}
        for key in [*tree, *(k for k in on if k not in tree)]:
            before, after = off.get(key, MISSING), on.get(key, MISSING)
            present = tree.get(key, MISSING)
            combined[key] = present if before is after else either(present, before, after, condition)
        return combined
    if isinstance(off, list) and isinstance(on, list) and (keys := identities(off, on)):
        before, after = keys
        trees = dict(zip(list_keys(tree), tree))
        combined = []
        for key in merged(list(trees), list(after)):
            present = trees.get(key, MISSING)
            combined.append(either(present, before.get(key, MISSING), after.get(key, MISSING), condition)
                            if key in before or key in after else present)
        return combined
    return If(condition, on, tree)


def either(tree, off, on, condition):
    if off is MISSING and on is MISSING:
        return tree
    if off is MISSING:
        return If(condition, on, tree)
    if on is MISSING:
        return If(condition, MISSING, tree)
    return combine(tree, off, on, condition)


def merged(present, added):
    """All keys, each added one after its predecessor."""
    order = list(present)
    for index, key in enumerate(added):
        if key not in order:
            order.insert(order.index(added[index - 1]) + 1 if index else 0, key)
    return order


def identity(item):
    while isinstance(item, If):
        item = item.otherwise if item.otherwise is not MISSING else item.then
    if not isinstance(item, dict):
        return None
    if "name" in item.get("secret", {}):
        return item["secret"]["name"]
    return item.get("mountPath") or item.get("name") or item.get("metadata", {}).get("name")


def list_keys(items):
    return [identity(item) for item in items]


def identities(off, on):
    """Both lists by what identifies their items; nothing if that is not unique."""
    found = []
    for items in (off, on):
        keys = list_keys(items)
        if None in keys or len(set(keys)) != len(keys):
            return None
        found.append(dict(zip(keys, items)))
    return found


def set_value(tree, path, expression):
    """Replaces what is at a path by an expression, in every branch that has it."""
    if isinstance(tree, If):
        return If(tree.condition, set_value(tree.then, path, expression), set_value(tree.otherwise, path, expression))
    if tree is MISSING:
        return tree
    if not path:
        return Raw(expression)
    head, rest = path[0], path[1:]
    if isinstance(tree, dict):
        if head not in tree:
            return tree
        return tree | {head: set_value(tree[head], rest, expression)}
    if isinstance(tree, list):
        keys = [str(index) for index in range(len(tree))] if head.isdigit() else list_keys(tree)
        return [set_value(item, rest, expression) if key == head else item for key, item in zip(keys, tree)]
    return tree


def has_value(tree, path):
    if isinstance(tree, If):
        return has_value(tree.then, path) or has_value(tree.otherwise, path)
    if not path:
        return tree is not MISSING
    if isinstance(tree, dict):
        return path[0] in tree and has_value(tree[path[0]], path[1:])
    if isinstance(tree, list):
        keys = [str(index) for index in range(len(tree))] if path[0].isdigit() else list_keys(tree)
        return any(has_value(item, path[1:]) for key, item in zip(keys, tree) if key == path[0])
    return False


def walk(node, visit, key=None, parent=None):
    """A copy whose scalars `visit(key of the nearest dict, keys above, scalar)` may replace."""
    if isinstance(node, If):
        return If(node.condition, walk(node.then, visit, key, parent), walk(node.otherwise, visit, key, parent))
    if isinstance(node, dict):
        return {k: walk(child, visit, k, key) for k, child in node.items()}
    if isinstance(node, list):
        return [walk(child, visit, key, parent) for child in node]
    return visit(key, parent, node)


def build():
    """The tree of all resources."""
    texts = yaml.safe_load((DEPLOY / "kubernetes/overlays/production/kustomization.yaml").read_text())
    baseline = [pathlib.PurePath(path).name for path in texts["components"]]
    off = render("baseline", baseline)
    tree = dict(off)
    images = {}
    for number, (condition, removed, added) in enumerate(OPTIONS):
        on = render(f"option-{number}", [c for c in baseline if c not in removed] + sorted(added))
        tree = combine(tree, off, on, condition)
    overlays = DEPLOY / "kubernetes/overlays"
    for overlay in overlays.glob("production*/kustomization.yaml"):
        for image in yaml.safe_load(overlay.read_text())["images"]:
            tag = image.get("newTag") or yaml.safe_load((DEPLOY / "kubernetes/base/kustomization.yaml").read_text())["images"][0]["newTag"]
            images[f"{image['newName']}:{tag}"] = IMAGES[image["name"]]

    def visit(key, parent, scalar):
        if not isinstance(scalar, str) or isinstance(scalar, Raw):
            return scalar
        if key == "image" and scalar in images:
            return Raw(f'{{{{ include "leadrelay.image" {value(images[scalar])} }}}}')
        if key == "namespace" and parent == "metadata":
            return Raw("{{ .Release.Namespace }}")
        if (key == "name" and parent in ("secret", "secretKeyRef") or key == "secretName") and scalar in SECRETS:
            return Raw(f"{{{{ {value(SECRETS[scalar])} }}}}")
        if ".leadrelay.svc." in scalar:
            return Raw(escape(scalar).replace(".leadrelay.svc.", ".{{ .Release.Namespace }}.svc."))
        return scalar

    tree = walk(tree, visit)
    for resource, path, name in VALUES:
        if not has_value(tree[resource], path.split(".")):
            raise SystemExit(f"{resource} has no {path}")
        tree[resource] = set_value(tree[resource], path.split("."), f"{{{{ toJson {value(name)} }}}}")
    for policy, name in (("reaches-nats", "nats.externalCidrs"), ("reaches-postgres", "externalPostgres.cidrs")):
        tree[f"NetworkPolicy/{policy}"] = walk_blocks(tree[f"NetworkPolicy/{policy}"], name)
    for name, settings in SETTINGS.items():
        tree[f"ConfigMap/{name}"] |= {"data": with_settings(name, tree[f"ConfigMap/{name}"]["data"], settings)}
    config = tree["ConfigMap/nats-config"]
    config.otherwise["data"]["accounts.conf"] = If(
        ".Values.nats.accounts", Raw("{{ toJson .Values.nats.accounts }}"), config.otherwise["data"]["accounts.conf"])
    return tree


def walk_blocks(node, name):
    """Lists of address blocks as a value."""
    if isinstance(node, If):
        return If(node.condition, walk_blocks(node.then, name), walk_blocks(node.otherwise, name))
    if isinstance(node, dict):
        return {key: walk_blocks(child, name) for key, child in node.items()}
    if isinstance(node, list):
        if node and all(isinstance(item, dict) and set(item) == {"ipBlock"} for item in node):
            return Raw(f'{{{{ include "leadrelay.blocks" {value(name)} }}}}')
        return [walk_blocks(child, name) for child in node]
    return node


def with_settings(name, data, settings):
    """The data of a ConfigMap, each entry from the values, and whatever else is there."""
    def entry(key, node):
        if isinstance(node, If) and (name, key) not in OWN:
            return If(node.condition, entry(key, node.then), entry(key, node.otherwise))
        if node is MISSING:
            # Users may still give a value that the option leaves out.
            return MISSING
        is_default = isinstance(data[key], If) and (name, key) not in OWN or name == "migrate"
        setting = f"{value(settings)}.{key}"
        given = f"({setting} | default {json.dumps(node)})" if is_default else setting
        return Raw(f'{{{{ include "leadrelay.quote" {given} }}}}')

    entries = {key: entry(key, node) for key, node in data.items()}
    known = " ".join(json.dumps(key) for key in data)
    return entries | {Raw(f"{{{{- include \"leadrelay.settings\" (omit {value(settings)} {known}) }}}}"): MISSING}


# Writing.

def escape(text):
    return text.replace("{{", '{{ "{{" }}')


def scalar(node, indent):
    if isinstance(node, Raw):
        return str(node)
    if isinstance(node, str) and "\n" in node:
        tail = "" if node.endswith("\n") and not node.endswith("\n\n") else "-" if not node.endswith("\n") else "+"
        pad = " " * (indent + 2)
        lines = escape(node).removesuffix("\n").split("\n")
        return f"|{tail}\n" + "\n".join(pad + line if line else "" for line in lines)
    text = yaml.safe_dump(node, width=10**9, allow_unicode=True).removesuffix("\n").removesuffix("\n...").strip()
    return escape(text)


def condition(lines, node, emit):
    if node.then is MISSING:
        lines.append(f"{{{{- if {negated(node.condition)} }}}}")
        emit(node.otherwise)
    else:
        lines.append(f"{{{{- if {node.condition} }}}}")
        emit(node.then)
        if node.otherwise is not MISSING:
            lines.append("{{- else }}")
            emit(node.otherwise)
    lines.append("{{- end }}")


def negated(text):
    return text.removeprefix("not ") if text.startswith("not ") else f"not {text}"


def emit_pair(lines, key, node, indent):
    pad = " " * indent
    if isinstance(key, Raw):
        lines.append(str(key))
    elif node is MISSING:
        return
    elif isinstance(node, If):
        condition(lines, node, lambda child: emit_pair(lines, key, child, indent))
    elif isinstance(node, dict) and node:
        lines.append(f"{pad}{key}:")
        emit_dict(lines, node, indent + 2)
    elif isinstance(node, list) and node:
        lines.append(f"{pad}{key}:")
        for item in node:
            emit_item(lines, item, indent)
    else:
        lines.append(f"{pad}{scalar(key, 0)}: {scalar(node, indent)}")


def emit_dict(lines, node, indent):
    for key, child in node.items():
        emit_pair(lines, key, child, indent)


def emit_item(lines, item, indent):
    if item is MISSING:
        return
    if isinstance(item, If):
        condition(lines, item, lambda child: emit_item(lines, child, indent))
    elif isinstance(item, dict) and item:
        # The dash is written before an entry that has no condition.
        ordered = dict(sorted(item.items(), key=lambda pair: isinstance(pair[1], If)))
        inner = []
        emit_dict(inner, ordered, indent + 2)
        lines.append(" " * indent + "- " + inner[0][indent + 2:])
        lines.extend(inner[1:])
    else:
        lines.append(" " * indent + f"- {scalar(item, indent)}")


HEADER = "{{- /* Generated from deploy/kubernetes by .ci/helm.py. */ -}}"


def hashed(name):
    return f'{{{{ include "leadrelay.name.{name}" . }}}}'


def templates():
    """The text of each template by its file name."""
    tree = build()
    names = {key.split("/")[1] for key in tree if key.startswith("ConfigMap/")} - {"migrate"}

    def references(key, parent, node):
        if key == "name" and parent in ("configMapRef", "configMapKeyRef", "configMap") and node in names:
            return Raw(hashed(node))
        return node

    files = {}
    for key, node in tree.items():
        kind, name = key.split("/")
        node = walk(node, references)
        lines = [HEADER]
        if kind == "ConfigMap" and name in names:
            config_map(lines, name, node)
        else:
            if kind == "Job":
                node["metadata"]["name"] = Raw('migrate-{{ include "leadrelay.version" . }}')
            emit_resource(lines, node)
        name = "migrate" if kind == "Job" else name
        files[f"{kind.lower()}-{name}.yaml"] = "\n".join(lines) + "\n"
    return files


def schema():
    """The schema of the values: what values.yaml has, and nothing else."""
    def of(key, default):
        if key == "config":
            return {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}}
        if key == "resources":
            return {"type": "object"}
        if isinstance(default, dict):
            properties = {name: of(name, child) for name, child in default.items()}
            return {"type": "object", "additionalProperties": False, "properties": properties}
        if isinstance(default, list):
            return {"type": "array", "items": {"type": "object" if isinstance(default[0], dict) else "string"}}
        types = {bool: ["boolean"], int: ["integer"], str: ["string"]}
        # A tag or a size may look like a number.
        return {"type": types[type(default)] + (["number"] if type(default) is str else [])}

    values = of("", yaml.safe_load((CHART / "values.yaml").read_text()))
    # Helm adds global values to charts that are dependencies of another chart.
    values["properties"]["global"] = {"type": "object"}
    return json.dumps({"$schema": "http://json-schema.org/draft-07/schema#", **values}, indent=1) + "\n"


def emit_resource(lines, node):
    if isinstance(node, If):
        condition(lines, node, lambda child: child is MISSING or emit_resource(lines, child))
    else:
        emit_dict(lines, node, 0)


def config_map(lines, name, node):
    """A ConfigMap with the hash of its contents in its name, so that pods restart when it changes. It is kept while pods of the
    version before may need it."""
    inner = node
    while isinstance(inner, If):
        inner = inner.otherwise if inner.otherwise is not MISSING else inner.then
    lines.append(f'{{{{- define "leadrelay.data.{name}" }}}}')
    emit_dict(lines, inner["data"], 0)
    lines.append("{{- end }}")
    lines.append(f'{{{{- define "leadrelay.name.{name}" -}}}}')
    lines.append(f'{name}-{{{{ include "leadrelay.data.{name}" . | sha256sum | trunc 10 }}}}')
    lines.append("{{- end }}")
    inner = dict(inner)
    inner["data"] = Raw(f'{{{{- include "leadrelay.data.{name}" . | nindent 2 }}}}')
    inner["metadata"] = inner["metadata"] | {"name": Raw(hashed(name)), "annotations": {"helm.sh/resource-policy": "keep"}}

    def rebuild(node):
        return If(node.condition, node.then if node.then is MISSING else rebuild(node.then),
                  node.otherwise if node.otherwise is MISSING else rebuild(node.otherwise)) if isinstance(node, If) else inner
    emit_resource(lines, rebuild(node))


def generated():
    """The text of each generated file by its path in the chart."""
    return {"values.schema.json": schema()} | {f"templates/{name}": text for name, text in templates().items()}


def present():
    """The same, as committed."""
    paths = [CHART / "values.schema.json", *(CHART / "templates").glob("*.yaml")]
    return {str(path.relative_to(CHART)): path.read_text() for path in paths
            if path.exists() and path.name != "validate.yaml"}


def write():
    made = generated()
    for name in present().keys() - made.keys():
        (CHART / name).unlink()
    for name, text in made.items():
        (CHART / name).write_text(text)


def differences():
    """The files that are not as the components and values.yaml make them."""
    made, committed = generated(), present()
    return sorted(name for name in made.keys() | committed.keys() if made.get(name) != committed.get(name))
