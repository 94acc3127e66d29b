/**
 * The CNI config through which the runtime calls genie, as CNI-Genie wrote it (`genie.conf`): its
 * own keys, put over the plugin table. Pure. Source: CNI-Genie's utils/types.go, client/client.go.
 */
import * as v from "valibot";
import { CniError, code, type LogLevel, logLevels, type StdinConfig } from "../cni.ts";
import { isObject } from "../json.ts";
import { attachment, type Config, isPath } from "./schema.ts";

/** Levels a CNI config may name, CNI-Genie's included, by the one we have. */
const stdinLevels = new Map<string, LogLevel>([
  ...logLevels.map((level) => [level, level] as const),
  ["trace", "debug"],
  ["notice", "info"],
  ["warning", "warn"],
  ["critical", "error"],
  ["fatal", "error"],
  ["panic", "error"],
]);

/** Our level for one a CNI config names, whatever its case; undefined for none. */
export function logLevelOf(name: unknown): LogLevel | undefined {
  return typeof name === "string" ? stdinLevels.get(name.trim().toLowerCase()) : undefined;
}

/**
 * The config with CNI-Genie's own keys of the CNI config put over it; its other keys are ignored.
 * As in CNI-Genie, a key that is "" counts as absent and `kubernetes` wins over `policy`.
 *
 * @throws CniError 7 naming a key that is wrong, never its value: it may be a secret
 */
export function withStdinConfig(config: Config, stdin: StdinConfig): Config {
  const read = (name: string) => stdinText(stdin, name, "a string", () => true);
  const readPath = (name: string) => stdinText(stdin, name, "an absolute path", isPath);
  const readUrl = (name: string) =>
    stdinText(stdin, name, 'a URL such as "https://10.96.0.1:443"', isApiRoot);
  const levelNames = `one of ${[...stdinLevels.keys()].join(", ")}`;
  const level = stdinText(stdin, "log_level", levelNames, (value) =>
    stdinLevels.has(value.toLowerCase()),
  );
  const names = 'a list of networks such as "weave,calico"';
  const networks = stdinText(stdin, "default_plugin", names, (value) =>
    splitNames(value).every((name) => v.is(attachment, name)),
  );
  const kubeconfig = readPath("kubernetes.kubeconfig");
  const policyRoot = readUrl("policy.k8s_api_root");
  const apiRoot = readUrl("kubernetes.k8s_api_root") || policyRoot;
  const authToken = read("policy.k8s_auth_token");
  const clientCertificate = readPath("policy.k8s_client_certificate");
  const clientKey = readPath("policy.k8s_client_key");
  const certificateAuthority = readPath("policy.k8s_certificate_authority");
  return {
    ...config,
    logLevel: stdinLevels.get(level.toLowerCase()) ?? config.logLevel,
    default: { ...config.default, ...(networks && { networks: splitNames(networks) }) },
    kubernetes: {
      ...config.kubernetes,
      ...(kubeconfig && { kubeconfig, kubeconfigIsExplicit: true }),
      // Early configs of CNI-Genie hold "https://host/api/v1/".
      ...(apiRoot && { apiRoot: apiRoot.replace(/\/api\/.*$|\/+$/, "") }),
      ...(authToken && { authToken }),
      ...(clientCertificate && { clientCertificate }),
      ...(clientKey && { clientKey }),
      ...(certificateAuthority && { certificateAuthority }),
    },
  };
}

const splitNames = (value: string) => value.split(",").map((name) => name.trim());

/** True for a URL without user information, which would be printed with the server's name. */
function isApiRoot(value: string): boolean {
  return /^https?:\/\/[^/@?#]+(\/[^@?#]*)?$/i.test(value) && URL.canParse(value);
}

/** A string of the CNI config, "" when absent. @param name "key" or "object.key" */
function stdinText(
  stdin: StdinConfig,
  name: string,
  expected: string,
  test: (value: string) => boolean,
): string {
  const [first = "", key] = name.split(".");
  let value = stdin[first] ?? undefined;
  if (key !== undefined && value !== undefined) {
    if (!isObject(value)) throw invalidStdin(first, "an object");
    value = value[key] ?? undefined;
  }
  if (value === undefined) return "";
  if (typeof value !== "string") throw invalidStdin(name, expected);
  const trimmed = value.trim();
  if (trimmed !== "" && !test(trimmed)) throw invalidStdin(name, expected);
  return trimmed;
}

function invalidStdin(name: string, expected: string): CniError {
  return new CniError(code.invalidConfig, `Invalid network config: "${name}" is not ${expected}`);
}
