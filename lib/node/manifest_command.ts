/** `genie manifest`: what a cluster needs of genie, as YAML for `kubectl apply -f -`. */
import manifest from "../../package.json";
import defaultTable from "../../plugins.toml" with { type: "text" };
import type { Host } from "../call.ts";
import * as cluster from "../cluster/manifest.ts";
import { type KubeObject, toYaml } from "../cluster/yaml.ts";
import { CniError, code } from "../cni.ts";
import { parseConfig } from "../config/parse.ts";
import type { Config } from "../config/schema.ts";
import { type Flags, text, UsageError } from "../config/usage.ts";
import { compileAccess } from "../policy/admission.ts";
import { enforcesPolicy } from "../settings.ts";
import { digest, readIfThere, readText } from "./files.ts";

/**
 * Runs `genie manifest`. @returns exit status
 * @throws CniError 5 for a table that cannot be read, 7 for one that is wrong
 */
export function runManifest(host: Host, flags: Flags): number {
  host.stdout(formatAnswer(host, flags));
  return 0;
}

function formatAnswer(host: Host, flags: Flags): string {
  if (flags["containerfile"]) return cluster.formatContainerfile(manifest.version);
  const table = readTable(text(flags, "table"));
  const place = {
    namespace: checked(flags, "namespace", "genie-system", /^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$/),
    image: checked(flags, "image", `genie:${manifest.version}`, /^[\w.\-/:@]{1,512}$/),
  };
  if (flags["grafana"]) return `${JSON.stringify(cluster.dashboard, null, 2)}\n`;
  if (flags["alerts"]) return toYaml(cluster.makeAlerts(place.namespace));
  const objects =
    flags["access"] || flags["webhook"]
      ? admissionObjects(flags, table.config, place)
      : cluster.makeManifest({ ...place, features: readFeatures(flags, table.config), table });
  if (objects.length === 0) {
    host.stderr(
      "genie: hint: the plugin table has no rule for pods or objects: there is no policy\n",
    );
  }
  const list = { apiVersion: "v1", kind: "List", items: objects };
  return flags["json"] ? `${JSON.stringify(list, null, 2)}\n` : toYaml(objects);
}

/** Objects that make the API server refuse at `kubectl apply` what a node would refuse. */
function admissionObjects(
  flags: Flags,
  config: Config,
  place: { namespace: string; image: string },
): KubeObject[] {
  const ca = text(flags, "ca");
  if (flags["webhook"] && ca === undefined) {
    throw new UsageError("--webhook needs --ca, the authority that signed its certificate");
  }
  return [
    ...(flags["access"] ? compileAccess(config) : []),
    ...(flags["webhook"] && ca !== undefined
      ? cluster.makeWebhook({ ...place, ca: readCa(ca) })
      : []),
  ];
}

function readCa(file: string): string {
  const content = readIfThere(file);
  if (content?.includes("-----BEGIN CERTIFICATE-----") && !content.includes("PRIVATE KEY")) {
    return content;
  }
  const issue = content === undefined ? "it does not exist" : "it is not certificates in PEM alone";
  throw new CniError(code.ioFailure, `Cannot use ${file} as --ca: ${issue}`);
}

function readTable(file: string | undefined): { text: string; sha256: string; config: Config } {
  const content = file === undefined ? defaultTable : readText(file);
  const config = parseConfig(content, file ?? "plugins.toml");
  return { text: content, sha256: digest({ text: content }), config };
}

/** The value of an option that must have a form. @throws UsageError for another value */
function checked(flags: Flags, name: string, fallback: string, form: RegExp): string {
  const value = text(flags, name) ?? fallback;
  if (form.test(value)) return value;
  throw new UsageError(`--${name} cannot be "${value}"`);
}

/** The features that `--features` lists, else those that the table switches on. */
function readFeatures(flags: Flags, config: Config): Set<cluster.Feature> {
  const listed = text(flags, "features");
  if (listed === undefined) return new Set(enforcesPolicy(config) ? ["policy"] : []);
  const words = listed.split(",").filter((word) => word !== "");
  const known = words.map((word) => {
    const feature = cluster.features.find((one) => one === word);
    if (feature) return feature;
    throw new UsageError(`--features knows ${cluster.features.join(", ")}, not "${word}"`);
  });
  return new Set(known);
}
