/**
 * `genie plan`: what an ADD of a pod would do, and why. Asks whom ADD would ask: of plugins only
 * those whose STATUS decides an automatic choice. Attaches nothing and changes nothing.
 */
import { CniError, type Host, interfaceNameIssue, type Request, type StdinConfig } from "../cni.ts";
import type { Config } from "../config/schema.ts";
import type { Verdict } from "../gate.ts";
import { resolveNetwork } from "../networks.ts";
import { readOwnConfig } from "../node/genie_config.ts";
import { askedPath } from "../node/runtime_settings.ts";
import { makePlan, type Plan, podLabel } from "../plan.ts";
import { annotationsCapability } from "../pod.ts";
import { judgeQuota, readHeld } from "../quota.ts";
import { readRecord } from "../report/file.ts";
import { formatTable } from "../report/table.ts";
import { readPath } from "../request.ts";
import { loadConfig } from "../settings.ts";
import type { Attachment } from "../state.ts";
import { choiceDocument, formatChoiceTable } from "./plan_choice.ts";
import { type Flags, text, UsageError } from "./usage.ts";

/**
 * Runs `genie plan`.
 * @param width columns of the terminal, Infinity for none
 * @returns exit status: 1 when the pod may not have some of it
 * @throws UsageError for words that make no sense; else as `makePlan()`
 */
export async function runPlan(host: Host, flags: Flags, width: number): Promise<number> {
  const stdin = readOwnConfig(text(flags, "cni-config"));
  const asked = dryRequest(host, stdin, flags);
  const config = await loadConfig(stdin);
  const request = { ...asked, path: [...asked.path, ...askedPath(config)] };
  const verdicts: Verdict[] = [];
  const plan = await makePlan(host, config, request, {
    failed: new Map(),
    reader: (inside) => readRecord(config.stateDir, inside),
    verdicts,
  });
  verdicts.push(...quotaVerdicts(config, plan));
  const status = verdicts.every(({ allowed }) => allowed) ? 0 : 1;
  if (flags["json"]) {
    host.stdout(`${JSON.stringify(planDocument(config, plan, verdicts), null, 2)}\n`);
    return status;
  }
  const rows = plan.attachments.map((one) => [
    one.network,
    one.ifName,
    one.list.plugins.map(({ type }) => type).join(", "),
    one.list.cniVersion,
    sourceOf(config, one),
    one.reason,
  ]);
  host.stdout(
    `Pod ${podLabel(plan.pod)}, annotations from: ${annotationOrigin[plan.pod.source]}\n\n` +
      formatTable(
        [
          { title: "NETWORK" },
          { title: "INTERFACE" },
          { title: "PLUGINS", shrinks: true },
          { title: "CNI" },
          { title: "CONFIG", shrinks: true },
          { title: "WHY", shrinks: true },
        ],
        rows,
        width,
      ),
  );
  if (plan.choice) {
    host.stdout(`\n${formatChoiceTable(plan.choice, config.select.weights, width)}`);
  }
  host.stdout(`\n${formatVerdicts(verdicts, width)}`);
  return status;
}

/** What the quotas say to the plan, where they refuse it: they count what is on record now. */
function quotaVerdicts(config: Config, { attachments }: Plan): Verdict[] {
  if (!config.access.maxAttachments) return [];
  try {
    const held = readRecord(config.stateDir, (reader) => readHeld(reader, attachments));
    judgeQuota(config, attachments, held ?? { pod: 0, namespace: 0 });
    return [];
  } catch (error) {
    if (!(error instanceof CniError) || error.rule === "") throw error;
    const { message: reason, rule } = error;
    return [{ network: "(all)", ifName: "", allowed: false, reason, rule }];
  }
}

function formatVerdicts(verdicts: Verdict[], width: number): string {
  return formatTable(
    [
      { title: "NETWORK" },
      { title: "INTERFACE" },
      { title: "ACCESS" },
      { title: "BECAUSE", wraps: true },
    ],
    verdicts.map(({ network, ifName, allowed, reason, rule = "" }) => [
      network,
      ifName,
      allowed ? "allowed" : "denied",
      rule === "" || reason.includes(rule) ? reason : `${reason} (${rule})`,
    ]),
    width,
  );
}

/** Where the config of a network is from. Objects of the API are no files. */
function sourceOf(config: Config, { network }: Attachment): string {
  try {
    return resolveNetwork(config, network).source;
  } catch (error) {
    if (error instanceof CniError) return "the Kubernetes API";
    throw error;
  }
}

const annotationOrigin: Record<Plan["pod"]["source"], string> = {
  runtime: "the command line",
  mesos: "Mesos labels",
  "cni-args": "CNI_ARGS",
  api: "the Kubernetes API",
  none: "nowhere, the pod asks for nothing",
};

/** Stable shape of `genie plan --json`. */
function planDocument(
  config: Config,
  { pod, attachments, choice }: Plan,
  verdicts: Verdict[],
): object {
  return {
    pod: { namespace: pod.namespace, name: pod.name, uid: pod.uid },
    annotationsFrom: pod.source,
    attachments: attachments.map((one) => ({
      network: one.network,
      interface: one.ifName,
      primary: one.primary,
      cniVersion: one.list.cniVersion,
      plugins: one.list.plugins.map(({ type }, i) => ({ type, path: one.plugins[i] })),
      config: sourceOf(config, one),
      reason: one.reason,
    })),
    access: verdicts.map(({ network, ifName, allowed, reason, rule = "" }) => ({
      network,
      interface: ifName,
      allowed,
      reason,
      rule,
    })),
    ...(choice && { choice: choiceDocument(choice, config.select.weights) }),
  };
}

/** The request a runtime would send for this pod; nothing of it is executed. */
function dryRequest(host: Host, config: StdinConfig, flags: Flags): Request {
  const annotations = readAnnotationFlags(flags["annotation"]);
  const pod = { namespace: text(flags, "namespace"), name: text(flags, "pod") };
  if (!pod.namespace || !pod.name) throw new UsageError("Both --namespace and --pod are needed");
  if (/[;=]/.test(pod.namespace + pod.name)) throw new UsageError('Names cannot hold ";" or "="');
  const ifName = text(flags, "ifname") ?? "eth0";
  const issue = interfaceNameIssue(ifName);
  if (issue) throw new UsageError(`Invalid --ifname ${JSON.stringify(ifName)}: ${issue}`);
  const runtimeConfig = annotations && { [annotationsCapability]: annotations };
  return {
    command: "ADD",
    containerId: "plan",
    netns: "",
    ifName,
    args: `K8S_POD_NAMESPACE=${pod.namespace};K8S_POD_NAME=${pod.name}`,
    path: readPath(host.env),
    cniVersion: "1.1.0",
    config: { ...config, ...(runtimeConfig && { runtimeConfig }) },
  };
}

function readAnnotationFlags(flags: Flags[string]): Record<string, string> | undefined {
  if (!Array.isArray(flags)) return undefined;
  return Object.fromEntries(
    flags.map((flag) => {
      const at = flag.indexOf("=");
      if (at < 1) throw new UsageError(`Invalid --annotation "${flag}": expected KEY=VALUE`);
      return [flag.slice(0, at), flag.slice(at + 1)];
    }),
  );
}
