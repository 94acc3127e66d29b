/**
 * `genie switch`: another network for a pod that runs, as its operator asks. Planned by the rules
 * of an ADD, through the same gate; what the pod itself asks for is not looked at.
 */
import { parseElements, requestedNameIssue } from "../annotations.ts";
import { type Flags, text, UsageError } from "../cli/usage.ts";
import { CniError, code, type Host, type StdinConfig } from "../cni.ts";
import { closeState, openState } from "../database.ts";
import { openObjects } from "../kubernetes/objects_of_call.ts";
import { beginJournal, writeAlone } from "../ledger.ts";
import { netnsId } from "../netns.ts";
import { planNamed } from "../plan.ts";
import { podLabel } from "../pod.ts";
import { judgeQuota, readHeld } from "../quota.ts";
import { formatTable } from "../report/table.ts";
import { loadConfig } from "../settings.ts";
import { type Attachment, attachments, type StoredAttachment } from "../state.ts";
import { onNode, type Wanted } from "../wanted.ts";
import { type Step, type Switched, type Switching, switchNetwork } from "./change_networks.ts";
import { readOwnConfig } from "./genie_config.ts";
import { firstOf, nameFor, requestOf } from "./running_pods.ts";

/** What the operator asked for. */
interface Asked {
  pod: { namespace: string; name: string };
  from: string | undefined;
  to: Wanted | undefined;
  isPrimary: boolean;
}

/**
 * Runs `genie switch NAMESPACE/POD`.
 *
 * @param width columns of the terminal, Infinity for none
 * @returns exit status: 1 when what was there is not quite gone
 * @throws UsageError; CniError of the plan and of what failed: then the pod has what it had, or the
 *   message says what it has not
 */
export async function runSwitch(host: Host, flags: Flags, width: number): Promise<number> {
  const asked = await readAsked(flags);
  host.catchSignals?.();
  const stdin = readOwnConfig(text(flags, "cni-config"));
  const config = await loadConfig(stdin);
  host.log = { level: config.logLevel, file: config.logFile };
  const state = openState(host, config.stateDir);
  try {
    const objects = openObjects(host, config);
    const work: Switching = { host, config, state, objects, command: "switch" };
    const rows = rowsOfPod(work, asked);
    const isDry = flags["dry-run"] === true;
    const step = await planStep(work, stdin, asked, rows, isDry);
    const switched = isDry ? previewOf(step) : await switchNetwork(work, step);
    const how = isDry ? howOf(step) : "";
    host.stdout(
      flags["json"] ? document(asked, rows, switched, isDry) : tell(switched, how, width),
    );
    return switched.problem === "" ? 0 : 1;
  } finally {
    closeState(state);
  }
}

async function readAsked(flags: Flags): Promise<Asked> {
  const words = Array.isArray(flags["words"]) ? flags["words"] : [];
  const [, namespace = "", name = ""] = /^([^/]+)\/([^/]+)$/.exec(words[0] ?? "") ?? [];
  if (words.length !== 1 || name === "") {
    throw new UsageError(`Invalid words "${words.join(" ")}": expected NAMESPACE/POD`);
  }
  const [from, to] = [text(flags, "from"), text(flags, "to")];
  const isPrimary = flags["primary"] === true;
  if (from === undefined && to === undefined) throw new UsageError("Give --from, --to or both");
  if (isPrimary && to === undefined) throw new UsageError("--primary needs --to");
  const wanted = to === undefined ? undefined : await readWanted(flags, to, namespace);
  if (isPrimary && wanted?.ifName !== undefined) {
    throw new UsageError("The primary attachment keeps its interface: leave the name out");
  }
  return { pod: { namespace, name }, from, to: wanted, isPrimary };
}

/** `blue`, `blue@net3`, `team-a/storage`; with --logical the name of a Logicalnetwork. */
async function readWanted(flags: Flags, to: string, podNamespace: string): Promise<Wanted> {
  const reason = "switch";
  const named = text(flags, "interface");
  const issue = named === undefined ? undefined : requestedNameIssue(named);
  if (issue) throw new UsageError(`Invalid --interface ${JSON.stringify(named)}: ${issue}`);
  const wanted = await parseWanted(to, podNamespace, flags["logical"] === true, reason);
  if (named !== undefined && wanted.ifName !== undefined && named !== wanted.ifName) {
    throw new UsageError(`Two interfaces are named, ${wanted.ifName} and ${named}`);
  }
  return { ...wanted, isFurther: true, ...(named !== undefined && { ifName: named }) };
}

async function parseWanted(
  to: string,
  podNamespace: string,
  isLogical: boolean,
  reason: string,
): Promise<Wanted> {
  if (to.includes("/") && !isLogical) {
    const { parseReference } = await import("../kubernetes/npwg.ts");
    return { ...parseReference(to, podNamespace, "--to"), from: "definition", reason };
  }
  const [element, ...others] = parseElements(to, "--to");
  if (!element || others.length > 0) throw new UsageError("--to takes one network");
  if (!isLogical) return onNode(element, reason);
  return { ...element, from: "logical", namespace: podNamespace, reason };
}

/** The attachments of the one call that is meant. @throws CniError 3, 101 */
function rowsOfPod({ host, state }: Switching, { pod, from }: Asked): StoredAttachment[] {
  const label = podLabel(pod);
  const all = attachments(host, state).filter(
    (row) => row.pod.namespace === pod.namespace && row.pod.name === pod.name,
  );
  const unknown = (why: string) =>
    new CniError(code.unknownContainer, `Cannot switch networks of pod ${label}: ${why}`);
  if (all.length === 0) throw unknown("nothing of it is on record on this node");
  const alive = all.filter((row) => row.netnsId !== "" && netnsId(row.netns) === row.netnsId);
  if (alive.length === 0) throw unknown("its network namespace is gone");
  const calls = Map.groupBy(alive, (row) => `${row.containerId} ${row.requestIfName}`);
  const meant = [...calls.values()].filter(
    (rows) => from === undefined || rows.some((row) => isNamed(row, from)),
  );
  const [rows, other] = meant;
  if (rows && !other) return rows;
  const names = [...new Set(alive.map((row) => `${row.network}@${row.ifName}`))].join(", ");
  if (other) throw unknown(`it was attached by several calls, name one of ${names} in --from`);
  throw new CniError(
    code.networkNotFound,
    `Cannot switch network "${from}" of pod ${label}: it has ${names}`,
  );
}

function isNamed({ network, ifName }: StoredAttachment, name: string): boolean {
  return name === network || name === `${network}@${ifName}`;
}

/** What is to be done. @throws CniError as an ADD's plan; 100 for a quota */
async function planStep(
  work: Switching,
  stdin: StdinConfig,
  asked: Asked,
  rows: readonly StoredAttachment[],
  isDry: boolean,
): Promise<Step> {
  const { host, config, state, objects } = work;
  const detach = detachedOf(asked, rows);
  if (!asked.to) return { planned: rows, ...(detach && { detach }) };
  const first = firstOf(rows);
  const request = requestOf(stdin, rows);
  const ifName = asked.isPrimary ? first.requestIfName : nameFor(asked.to, rows, detach);
  const pod = {
    ...first.pod,
    ...{ serviceAccount: undefined, annotations: new Map<string, string>() },
    source: "none" as const,
  };
  const journal = beginJournal(host, {
    ...{ command: "ADD", containerId: first.containerId, ifName: first.requestIfName },
    ...{ network: first.requestNetwork, pod: first.pod, decidedBy: "switch" },
  });
  const call = { host, config, request, objects, pod };
  const held = rows.filter((row) => row !== detach);
  try {
    const planned = await planNamed(call, [{ ...asked.to, ifName }], { journal }, held);
    const [attach] = planned;
    if (isDry) {
      const on = readHeld(state, planned);
      const freed = detach ? 1 : 0;
      judgeQuota(config, planned, { pod: on.pod - freed, namespace: on.namespace - freed });
    }
    return { planned: rows, ...(detach && { detach }), ...(attach && { attach }) };
  } catch (error) {
    if (!isDry) writeAlone(host, state, journal, error);
    throw error;
  }
}

/** Which attachment goes. @throws UsageError for a primary that was not meant, or two of a name */
function detachedOf(
  { from, isPrimary, to }: Asked,
  rows: readonly StoredAttachment[],
): StoredAttachment | undefined {
  const primary = rows.find((row) => row.ifName === row.requestIfName);
  if (from === undefined) return isPrimary ? primary : undefined;
  const [row, other] = rows.filter((one) => isNamed(one, from));
  if (other) {
    throw new UsageError(
      `The pod has it on ${row?.ifName} and ${other.ifName}: --from ${from}@...`,
    );
  }
  if (row && row === primary && !(isPrimary && to)) {
    throw new UsageError(
      `Network "${row.network}" is the pod's primary one (${row.ifName}): only --primary with ` +
        "--to puts another one in its place, and its address with it",
    );
  }
  if (isPrimary && row !== primary) {
    throw new UsageError(`Network "${from}" is not the pod's primary one, ${primary?.network}`);
  }
  return row;
}

/** What would be done. */
function previewOf({ detach, attach }: Step): Switched {
  const partOf = ({ network, ifName }: Attachment) => ({ network, ifName, addresses: [] });
  return {
    ...(attach && { attached: partOf(attach) }),
    ...(detach && { detached: partOf(detach) }),
    problem: "",
  };
}

function howOf({ detach, attach }: Step): string {
  if (!detach || !attach) return "nothing else changes";
  return detach.ifName === attach.ifName
    ? "the old one goes first: the interface keeps its name"
    : "the new one is made before the old one goes";
}

/** Stable shape of `genie switch --json`. */
function document(
  { pod }: Asked,
  rows: readonly StoredAttachment[],
  { attached, detached, problem }: Switched,
  isDry: boolean,
): string {
  const { containerId, requestIfName } = firstOf(rows);
  const part = (one: Switched["attached"]) =>
    one ? { network: one.network, interface: one.ifName, addresses: one.addresses } : null;
  const shape = {
    pod: { ...pod, containerId },
    dryRun: isDry,
    attached: part(attached),
    detached: part(detached),
    primary: attached?.ifName === requestIfName,
    problem,
  };
  return `${JSON.stringify(shape, null, 2)}\n`;
}

function tell({ attached, detached, problem }: Switched, how: string, width: number): string {
  const line = (verb: string, one: Switched["attached"], more: string) =>
    one ? [[verb, one.network, one.ifName, one.addresses.join(", ") || "none", more]] : [];
  const isDry = how !== "";
  const rows = [
    ...line(isDry ? "attach" : "attached", attached, how),
    ...line(isDry ? "detach" : "detached", detached, problem || (attached ? "" : how)),
  ];
  const columns = ["", "NETWORK", "INTERFACE", "ADDRESSES"].map((title) => ({ title }));
  return formatTable([...columns, { title: "", wraps: true }], rows, width);
}
