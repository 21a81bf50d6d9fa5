// Checks an AsyncAPI document against the schema that the AsyncAPI initiative publishes, and that every link in it leads somewhere.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";

const require = createRequire(`${process.env.NODE_PATH}/package.json`);
const Ajv = require("ajv");
const addFormats = require("ajv-formats");

const file = process.argv[2];
const document = JSON.parse(readFileSync(file, "utf8"));
const schema = require(`@asyncapi/specs/schemas/${document.asyncapi}-without-$id.json`);
const ajv = new Ajv({ strict: false, allErrors: true });
addFormats(ajv);
const validate = ajv.compile(schema);
const faults = validate(document) ? [] : validate.errors.map((e) => `${e.instancePath} ${e.message}`);

function target(link) {
  const [path, pointer] = link.split("#");
  let value = path ? JSON.parse(readFileSync(join(dirname(file), path), "utf8")) : document;
  for (const part of (pointer ?? "").split("/").slice(1)) value = value[part.replaceAll("~1", "/").replaceAll("~0", "~")];
  return value;
}

(function walk(value) {
  if (value === null || typeof value !== "object") return;
  if (typeof value.$ref === "string") {
    try {
      if (target(value.$ref) === undefined) faults.push(`${value.$ref} leads nowhere`);
    } catch (e) {
      faults.push(`${value.$ref}: ${e.message}`);
    }
  }
  Object.values(value).forEach(walk);
})(document);
for (const fault of faults) console.error(`${file}: ${fault}`);
process.exit(faults.length ? 1 : 0);
