/** `genie manifest`: what a cluster needs of genie, as YAML for `kubectl apply -f -`. */
import manifest from "../../package.json";
import defaultTable from "../../plugins.toml" with { type: "text" };
import { type Flags, text, UsageError } from "../cli/usage.ts";
import { compileAccess } from "../cluster/admission.ts";
import { formatContainerfile } from "../cluster/containerfile.ts";
import { toYaml } from "../cluster/crds.ts";
import { type Feature, features, type KubeObject, makeManifest } from "../cluster/manifest.ts";
import { makeAlerts, makeDashboard } from "../cluster/monitoring.ts";
import { makeWebhook } from "../cluster/webhook_manifest.ts";
import { CniError, code, type Host } from "../cni.ts";
import { parseConfig } from "../config/parse.ts";
import type { Config } from "../config/schema.ts";
import { enforcesPolicy } from "../settings.ts";
import { digest, readIfThere } from "./files.ts";

/**
 * Runs `genie manifest`.
 * @returns exit status
 * @throws CniError 5 for a table that cannot be read, 7 for one that is wrong
 */
export function runManifest(host: Host, flags: Flags): number {
  if (flags["containerfile"]) {
    host.stdout(formatContainerfile(manifest.version));
    return 0;
  }
  const table = readTable(text(flags, "table"));
  const place = {
    namespace: checked(flags, "namespace", "genie-system", /^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$/),
    image: checked(flags, "image", `genie:${manifest.version}`, /^[\w.\-/:@]{1,512}$/),
  };
  if (flags["grafana"]) {
    host.stdout(`${JSON.stringify(makeDashboard(), null, 2)}\n`);
    return 0;
  }
  if (flags["alerts"]) {
    host.stdout(toYaml([makeAlerts(place.namespace)]));
    return 0;
  }
  const isPart = Boolean(flags["access"] || flags["webhook"]);
  const objects = isPart
    ? admissionObjects(flags, table.config, place)
    : makeManifest({
        ...place,
        features: readFeatures(text(flags, "features"), table.config),
        table,
      });
  if (objects.length === 0) {
    host.stderr(
      "genie: hint: the plugin table has no rule for pods or objects: there is no policy\n",
    );
  }
  if (flags["json"]) {
    const list = { apiVersion: "v1", kind: "List", items: objects };
    host.stdout(`${JSON.stringify(list, null, 2)}\n`);
  } else {
    host.stdout(toYaml(objects));
  }
  return 0;
}

/** What refuses at `kubectl apply` what a node would refuse. */
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
    ...(flags["webhook"] && ca !== undefined ? makeWebhook({ ...place, ca: readCa(ca) }) : []),
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
  const content = file === undefined ? defaultTable : readIfThere(file);
  if (content === undefined) {
    throw new CniError(code.ioFailure, `Cannot read ${file}: it does not exist`);
  }
  const config = parseConfig(content, file ?? "plugins.toml");
  return { text: content, sha256: digest({ text: content }), config };
}

function checked(flags: Flags, name: string, initial: string, pattern: RegExp): string {
  const value = text(flags, name) ?? initial;
  if (pattern.test(value)) return value;
  throw new UsageError(`--${name} cannot be "${value}"`);
}

/** The features named, else those that the table switches on. */
function readFeatures(words: string | undefined, config: Config): Set<Feature> {
  if (words === undefined) {
    return new Set(enforcesPolicy(config) ? ["policy"] : []);
  }
  const named = words.split(",").filter((word) => word !== "");
  return new Set(
    named.map((word) => {
      const known = features.find((feature) => feature === word);
      if (known !== undefined) return known;
      throw new UsageError(`--features knows ${features.join(", ")}, not "${word}"`);
    }),
  );
}
