/**
 * The right to ask the Kubernetes API, put where genie's calls on the node find it: a copy of a
 * kubeconfig, or one made of the service account of the pod that installs, whose token stands in a
 * file of its own because it expires within the hour and is copied anew by the node agent.
 * Source: https://kubernetes.io/docs/reference/config-api/kubeconfig.v1/
 */
import { dirname, isAbsolute, join } from "node:path";
import { toYaml } from "../cluster/crds.ts";
import { CniError, code, type Host } from "../cni.ts";
import { isObject } from "../json.ts";
import { isConfigured, serviceAccountDirDefault } from "../kubernetes/credentials.ts";
import { findAccount, override, readSecrets } from "../kubernetes/kubeconfig.ts";
import { digest, digestOf, makeFolder, placeFile, readIfThere } from "./files.ts";
import { hostFile, hostPath } from "./host_root.ts";
import { ownDir, paths, put, type Site, type Step } from "./installation.ts";

/** Only for finding an account; nothing is sent. */
const noTimeout = { kubeconfigIsExplicit: true, timeoutMs: 0 };

/**
 * Puts the credentials in place.
 *
 * @param kubeconfig file to copy; absent: the service account of the pod we run in, if any
 * @throws CniError 5 or 7 for credentials that could not be used on the node
 */
export async function kubeAccess(
  host: Host,
  site: Site,
  kubeconfig: string | undefined,
  folder = serviceAccountDirDefault,
): Promise<Step[]> {
  if (kubeconfig !== undefined) {
    const text = readIfThere(kubeconfig);
    if (text === undefined) throw unusable(kubeconfig, "it does not exist");
    checkPaths(kubeconfig, text);
    const account = findAccount(host, { ...noTimeout, kubeconfig });
    override(account, noTimeout);
    return [putSecret(site, "kubeconfig", text)];
  }
  const inPod = { kubeconfigIsExplicit: false, timeoutMs: 0, serviceAccountDir: folder };
  if (!isConfigured(host, inPod)) {
    const detail = "no credentials: give --kubeconfig where networks are objects of the API";
    return [{ did: "skipped", path: paths.kubeconfig, detail }];
  }
  const account = findAccount(host, inPod);
  const { tls, headers } = await readSecrets(account);
  const token = headers["Authorization"]?.replace(/^Bearer /, "") ?? "";
  const text = formatKubeconfig(override(account, inPod).server, tls.ca ?? "");
  // The token first: a kubeconfig without it fails every call that needs the API.
  return [putSecret(site, "token", `${token}\n`), putSecret(site, "kubeconfig", text)];
}

function putSecret(site: Site, kind: "kubeconfig" | "token", text: string): Step {
  makeFolder(hostPath(site.root, ownDir), 0o700);
  const content = { text };
  return put(site, { kind, path: paths[kind], content, mode: 0o600, others: "replace" });
}

/** A kubeconfig by which a call on the node asks with the token beside it. */
function formatKubeconfig(server: string, ca: string): string {
  const name = "genie";
  const cluster = { server, "certificate-authority-data": Buffer.from(ca).toString("base64") };
  return toYaml([
    {
      apiVersion: "v1",
      kind: "Config",
      clusters: [{ name, cluster }],
      users: [{ name, user: { tokenFile: paths.token } }],
      contexts: [{ name, context: { cluster: name, user: name } }],
      "current-context": name,
    },
  ]);
}

/** A relative path would mean another file once the kubeconfig is copied. */
function checkPaths(file: string, text: string): void {
  const keys = /^(certificate-authority|client-certificate|client-key|tokenFile)$/;
  const visit = (value: unknown): void => {
    if (Array.isArray(value)) for (const one of value) visit(one);
    if (!isObject(value)) return;
    for (const [key, one] of Object.entries(value)) {
      if (keys.test(key) && typeof one === "string" && one !== "" && !isAbsolute(one)) {
        throw unusable(
          file,
          `its ${key} is a relative path, embed it: kubectl config view --flatten`,
        );
      }
      visit(one);
    }
  };
  try {
    visit(Bun.YAML.parse(text));
  } catch (error) {
    if (error instanceof CniError) throw error;
    // Not the parser's words: they may quote a token.
    throw unusable(file, "it is neither YAML nor JSON");
  }
}

function unusable(file: string, reason: string): CniError {
  return new CniError(code.invalidConfig, `Cannot use the kubeconfig ${file}: ${reason}`);
}

/**
 * Copies the token of the pod we run in to where genie's calls on the node read it.
 *
 * @param root the node's root for us
 * @returns true when there was a new one
 * @throws CniError 5 when it cannot be read or written
 */
export function copyToken(root: string, folder = serviceAccountDirDefault): boolean {
  const file = join(folder, "token");
  const token = readIfThere(file)?.trim();
  if (token === undefined || token === "") throw unreadable(file);
  const target = hostFile(root, paths.token);
  const content = { text: `${token}\n` };
  if (digestOf(target) === digest(content)) return false;
  makeFolder(dirname(target), 0o700);
  placeFile(target, content, 0o600);
  return true;
}

function unreadable(file: string): CniError {
  return new CniError(code.ioFailure, `Cannot read ${file}: there is no token in it`);
}
