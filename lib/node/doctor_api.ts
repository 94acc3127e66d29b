/**
 * The right to ask the Kubernetes API: private, valid, accepted, and enough of it. Each right is
 * asked for by SelfSubjectAccessReview (authorization.k8s.io/v1), which everyone may.
 */
import { statSync } from "node:fs";
import { type Rule, rules } from "../cluster/manifest.ts";
import { toCniError } from "../cni.ts";
import { isObject } from "../json.ts";
import { connect, type Kube } from "../kubernetes/client.ts";
import { isConfigured } from "../kubernetes/credentials.ts";
import { enforcesPolicy } from "../settings.ts";
import { ok, problem, type Said } from "./finding.ts";
import { paths } from "./installation.ts";
import type { NodeView } from "./node_view.ts";

/** Certificates and tokens have their own clock: more than this breaks them. */
const skewMs = 30_000;

/** Credentials, the server, its clock, and our rights. */
export async function checkApi(view: NodeView): Promise<Said[]> {
  const { host, at, config } = view;
  const kubeconfig = at(config.kubernetes.kubeconfig);
  const settings = { ...config.kubernetes, kubeconfig };
  if (!isConfigured(host, settings)) {
    const text = `${config.kubernetes.kubeconfig} is not there: networks are those of the node`;
    return [ok(text)];
  }
  const said = [kubeconfig, at(paths.token)].flatMap((file) => checkPrivate(file));
  try {
    const kube = await connect(host, settings);
    const started = performance.now();
    const missing = await missingRights(kube, wantedRules(view));
    const tookMs = Math.round(performance.now() - started);
    const remedy = "kubectl auth can-i says the same; genie manifest has the rules";
    for (const right of missing) said.push(problem(`no right to ${right}`, remedy));
    if (missing.length === 0) {
      said.push(ok(`${kube.server} grants all rights, in ${tookMs} ms`));
    }
    said.push(...checkSkew(host.now(), kube.serverMs));
  } catch (error) {
    const { message } = toCniError(error);
    said.push(problem(message, "see the kubeconfig, its token, and the server"));
  }
  return said;
}

function checkPrivate(file: string): Said[] {
  const found = statSync(file, { throwIfNoEntry: false });
  if (!found || (found.mode & 0o077) === 0) return [];
  return [problem(`${file} can be read by others`, `chmod 600 ${file}`)];
}

function checkSkew(nowMs: number, serverMs: number | undefined): Said[] {
  if (serverMs === undefined) return [];
  const aheadMs = nowMs - serverMs;
  if (Math.abs(aheadMs) < skewMs) return [];
  const seconds = Math.round(Math.abs(aheadMs) / 1000);
  const what = `the clock is ${seconds} s ${aheadMs > 0 ? "ahead of" : "behind"} the API server's`;
  return [problem(what, "run an NTP client: tokens and certificates are refused")];
}

function wantedRules({ config }: NodeView): readonly Rule[] {
  const isPolicy = enforcesPolicy(config);
  return rules.filter(({ feature }) => !feature || (feature === "policy" && isPolicy));
}

/** Rights that the server does not grant, in words. @throws CniError 11 when it cannot be asked */
async function missingRights(kube: Kube, wanted: readonly Rule[]): Promise<string[]> {
  const path = ["apis", "authorization.k8s.io", "v1", "selfsubjectaccessreviews"];
  const rights = wanted.flatMap(({ apiGroups, resources, verbs }) =>
    resources.flatMap((one) => verbs.map((verb) => ({ group: apiGroups[0] ?? "", one, verb }))),
  );
  const asked = rights.map(async ({ group, one, verb }) => {
    const [resource = "", subresource] = one.split("/");
    const resourceAttributes = { group, resource, verb, ...(subresource && { subresource }) };
    const answer = await kube.post(path, {
      apiVersion: "authorization.k8s.io/v1",
      kind: "SelfSubjectAccessReview",
      spec: { resourceAttributes },
    });
    const status = isObject(answer) ? answer["status"] : undefined;
    const isAllowed = isObject(status) && status["allowed"] === true;
    return isAllowed ? [] : [`${verb} ${one}${group === "" ? "" : ` of ${group}`}`];
  });
  return (await Promise.all(asked)).flat();
}
