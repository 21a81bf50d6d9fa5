// Checks resources against published packages that are generated from the definitions of Kubernetes and of the
// operators (CRDs). Their TypeScript types have every field and, unlike the schemas of kubernetes-validate, the allowed
// words of a field. Except for CloudNativePG, they also have validators. Reads a JSON list of resources from standard
// input.
//
// The packages are pinned, with hashes, in package-lock.json; NODE_PATH says where they are installed.
import { existsSync, readFileSync, writeFileSync, mkdtempSync, rmSync, symlinkSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { tmpdir } from "node:os";
import { pathToFileURL } from "node:url";

const modules = process.env.NODE_PATH;
const require = createRequire(join(modules, "package.json"));
const ts = require("typescript");

// The package with the resources of an API group; by default, that of Kubernetes itself.
const PACKAGES = {
  "keda.sh": "@kubernetes-models/keda",
  "monitoring.coreos.com": "@kubernetes-models/prometheus-operator",
  "gateway.networking.k8s.io": "@kubernetes-models/gateway-api",
};

function schemaOf({ apiVersion, kind }) {
  if (apiVersion === "postgresql.cnpg.io/v1") {
    // This package has only types, without apiVersion and kind.
    return { module: "@cdk8s-kit/crds/pg", type: `${kind}Props`, props: true };
  }
  const name = PACKAGES[apiVersion.split("/")[0]] ?? "kubernetes-models";
  const module = `${name}/${apiVersion}/${kind}`;
  return existsSync(join(modules, `${module}.js`)) ? { module, type: `I${kind}`, model: kind } : undefined;
}

const resources = JSON.parse(readFileSync(0, "utf8"));
const faults = [];
let source = `
// Replaces enums by their values, and quantities by their YAML types.
type Plain<T> = T extends string ? \`\${T}\`
  : T extends { readonly value: any } ? string | number
  : T extends object ? { [K in keyof T]: Plain<T[K]> }
  : T;
`;
const names = [];
for (const [index, resource] of resources.entries()) {
  const name = `${resource.kind} ${resource.metadata.name}`;
  const known = schemaOf(resource);
  if (!known) {
    faults.push(`${name}: no package in .ci/schemas has a ${resource.kind} of ${resource.apiVersion}`);
    continue;
  }
  const { apiVersion, kind, ...props } = resource;
  // The types of CloudNativePG's resources spell this name differently.
  const value = JSON.stringify(known.props ? props : resource, null, 1).replaceAll('"isWALArchiver"', '"isWalArchiver"');
  // Each resource has its own line, so that a message of the compiler identifies it.
  source += `import type { ${known.type} as T${index} } from "${known.module}";\n`;
  source += `/* ${names.length} */ export const r${index}: Plain<T${index}> = ${value};\n`;
  names.push(name);
  if (known.model) {
    try {
      const model = await import(pathToFileURL(join(modules, `${known.module}.js`)));
      new model[known.model](resource).validate();
    } catch (e) {
      faults.push(`${name}: ${e.message}`);
    }
  }
}

const dir = mkdtempSync(join(tmpdir(), "crds-"));
try {
  symlinkSync(modules, join(dir, "node_modules"));
  const file = join(dir, "check.mts");
  writeFileSync(file, source);
  const program = ts.createProgram([file], {
    strict: true, noEmit: true, skipLibCheck: true, types: [],
    target: ts.ScriptTarget.ES2022, module: ts.ModuleKind.NodeNext, moduleResolution: ts.ModuleResolutionKind.NodeNext,
  });
  for (const diagnostic of ts.getPreEmitDiagnostics(program)) {
    const text = ts.flattenDiagnosticMessageText(diagnostic.messageText, "\n  ");
    const before = diagnostic.file?.text.slice(0, diagnostic.start).match(/\/\* (\d+) \*\//g)?.at(-1);
    const name = before ? names[Number(before.slice(3, -3))] : diagnostic.file?.fileName ?? "";
    faults.push(`${name}: ${text}`);
  }
} finally {
  rmSync(dir, { recursive: true });
}
for (const fault of faults) console.error(fault);
process.exit(faults.length ? 1 : 0);
