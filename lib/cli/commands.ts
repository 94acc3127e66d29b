/**
 * The table of the operator's commands. Each command loads only what it needs. Its help is the
 * table of its options: parsing and completion read them there, so none is described twice.
 */
import manifest from "../../package.json";
import type { Host } from "../call.ts";
import { supportedVersions } from "../cni.ts";
import { type Flags, text, UsageError } from "../config/usage.ts";

/** One command of the operator. */
export interface CommandLine {
  /** What stands after its name in the usage line. */
  usage: string;
  summary: string;
  /** Text for `--help`, after the usage line; its rows are read by {@link optionsOf}. */
  help: string;
  /** It takes words that belong to no option. */
  takesWords?: true;
  /** Options that may be given any number of times. */
  repeatable?: readonly string[];
  run: (host: Host, flags: Flags) => Promise<number> | number;
}

/** One option of a command. */
export interface CommandOption {
  /** Without the dashes. */
  name: string;
  /** What its value is: FILE and DIR are paths; "" when it takes none. */
  value: string;
  /** What it does, in one line. */
  text: string;
}

/** Column of the help in which the text of an option begins. */
const textColumn = 23;

/** The options of a command: rows `  --name VALUE  text` of its help; a text may go on below. */
export function optionsOf({ help }: CommandLine): CommandOption[] {
  const options: CommandOption[] = [];
  for (const line of help.split("\n")) {
    const text = line.slice(textColumn);
    if (line.startsWith("  --")) {
      const [name = "", value = ""] = line.slice(4, textColumn).trim().split(" ");
      options.push({ name, value, text });
    } else if (line.startsWith(" ".repeat(textColumn))) {
      const last = options.at(-1);
      if (last) last.text += ` ${text}`;
    }
  }
  return options;
}

const cniConfigHelp = `  --cni-config FILE    the CNI config through which the runtime calls genie;
                       default: the first one with type genie in /etc/cni/net.d
  --json               one JSON document, for programs`;

/** Every command, by its name. */
export const commandLines: Record<string, CommandLine> = {
  plan: {
    usage: "--namespace NAME --pod NAME [options]",
    summary: "show what a pod would be attached to, and why; attaches nothing",
    help: `  --namespace NAME     namespace of the pod
  --pod NAME           name of the pod
  --annotation K=V     an annotation of the pod, any number of times; without one, the pod is
                       looked up in the Kubernetes API where credentials are configured
  --ifname NAME        interface the runtime asks for (CNI_IFNAME), default eth0
${cniConfigHelp}

Folders for plugin binaries: CNI_PATH, then bin_dirs of the plugin table.`,
    repeatable: ["annotation"],
    run: async (host, flags) => {
      const { askedPath, readOwnConfig } = await import("../node/genie_config.ts");
      const { runPlan } = await import("./plan_command.ts");
      const own = readOwnConfig(text(flags, "cni-config"));
      return runPlan(host, flags, { own, askedPath, width: terminalWidth() });
    },
  },
  validate: {
    usage: "[--cni-config FILE] [--json]",
    summary: "check the plugin table, every config list and the plugin binaries",
    help: cniConfigHelp,
    run: async (host, flags) =>
      (await import("../node/validate.ts")).runValidate(host, flags, terminalWidth()),
  },
  install: {
    usage: "[options]",
    summary: "put genie on this node, or a new version of it in its place",
    help: `  --table FILE         the plugin table to install; default: one that explains every key,
                       where there is none yet
  --kubeconfig FILE    credentials to copy, for networks that are objects of the API; default:
                       the service account of the pod it runs in
  --conf-dir DIR       where the runtime looks for CNI configs; default: as its settings say
                       (containerd, CRI-O, podman with CNI), else /etc/cni/net.d
  --bin-dir DIR        where the runtime looks for plugins; default: as its settings say, else
                       /opt/cni/bin
  --wait DURATION      how long the default network is waited for, default 2m
  --no-wait            write the CNI config whether that network is ready or not
  --downgrade          put this version over a newer one
  --host-root DIR      the node's root, where it is mounted in a container: /host
  --json               one JSON document, for programs

Run it again for a new version: pods may start meanwhile. The version before stays beside it as
genie.previous. What was there before the first time is kept, and put back by genie uninstall.`,
    run: async (host, flags) =>
      (await import("../node/install.ts")).runInstall(host, flags, ownProgram()),
  },
  uninstall: {
    usage: "[--force] [--purge] [--host-root DIR] [--json]",
    summary: "take genie off this node and put back what was there before",
    help: `  --force              also while pods are attached: new pods get the network that
                       follows, and genie stays behind it for the DEL of those there are
  --purge              remove the record too: what happened on this node is forgotten
  --host-root DIR      the node's root, where it is mounted in a container: /host
  --json               one JSON document, for programs

Files that were changed since they were installed stay.`,
    run: async (host, flags) => (await import("../node/install.ts")).runUninstall(host, flags),
  },
  doctor: {
    usage: "[--conf-dir DIR] [--host-root DIR] [--json]",
    summary: "look over this node: what is wrong, and what to do about it",
    help: `  --conf-dir DIR       where the runtime looks for CNI configs; default: where genie's is
  --host-root DIR      the node's root, where it is mounted in a container: /host
  --json               one JSON document, for programs

Changes nothing. Status 1 when there is a problem; warnings alone are 0.`,
    run: async (host, flags) =>
      (await import("../node/doctor.ts")).runDoctor(host, flags, terminalWidth()),
  },
  manifest: {
    usage: "[options]",
    summary: "print what a cluster needs of genie, for kubectl apply -f -",
    help: `  --namespace NAME     where genie's pods run, default genie-system
  --image NAME         the image of genie, default genie:${manifest.version}
  --table FILE         the plugin table of all nodes; default: one that explains every key
  --features LIST      rights for more than ADD and DEL: policy, switch, cluster-report; default:
                       those that the table switches on, "" for none
  --access             print the table's rules of access as ValidatingAdmissionPolicies instead:
                       what a node would refuse is refused at kubectl apply
  --webhook            print what runs genie webhook instead; needs --ca
  --ca FILE            the authority that signed the certificate of genie webhook
  --containerfile      print how to build the image instead
  --grafana            print a dashboard of the agents' metrics instead
  --alerts             print alert rules for the Prometheus operator instead
  --json               one JSON document, for programs`,
    run: async (host, flags) =>
      (await import("../node/manifest_command.ts")).runManifest(host, flags),
  },
  agent: {
    usage: "[--cni-config FILE]",
    summary: "run beside the kubelet: policies, statuses, leftovers, metrics of this node",
    help: `  --cni-config FILE    the CNI config through which the runtime calls genie;
                       default: the first one with type genie in /etc/cni/net.d

Keeps network policies in force, publishes what ADD could not, collects what was left behind, keeps
the CNI config and its token in place, and answers /metrics and /healthz, see [policy] and [agent]
in plugins.toml. Pods start and stop without it.

One process per node; a second one waits for the first to end. Ends with SIGTERM or SIGINT.
Writes one line per event to stderr.`,
    run: async (host, flags) => (await import("../agent/agent.ts")).runAgent(host, flags),
  },
  repair: {
    usage: "NAMESPACE/POD [--network NAME] [--all] [--dry-run] [--cni-config FILE] [--json]",
    summary: "detach and attach again what is broken of a running pod, with the same address",
    help: `  NAMESPACE/POD        a pod that runs on this node
  --network NAME       of its networks this one alone; default: each, one after the other
  --all                also what is healthy
  --dry-run            say what is broken, and change nothing
${cniConfigHelp}

Broken is what the CHECK of its plugins says, or has lost its interface, an address or a route.

From the record: interfaces and networks stay what they were, whatever the pod asks for by now. An
IPAM that takes no wishes may give another address. Connections through the interface are cut.
Status 1 when one cannot be attached, or the pod's own address has changed.`,
    takesWords: true,
    run: async (host, flags) =>
      (await import("../node/repair.ts")).runRepair(host, flags, terminalWidth()),
  },
  switch: {
    usage: "NAMESPACE/POD [--from NETWORK] [--to NETWORK] [options]",
    summary: "give a running pod another network in the place of one that it has",
    help: `  NAMESPACE/POD        a pod that runs on this node
  --from NETWORK       detach it; NETWORK@INTERFACE where the pod has it twice
  --to NETWORK         attach it: a network of the node, or NAMESPACE/NAME, an object
  --logical            --to names a Logicalnetwork of the pod's namespace
  --interface NAME     for the new one; default: the next free name
  --primary            in the place of the pod's primary network: the interface keeps its name,
                       and the pod gets an address that Kubernetes does not know of
  --dry-run            show what would be done, and whether the pod may have it
${cniConfigHelp}

--to alone attaches one more, --from alone detaches one. The new one is made before the old one
goes, unless --interface gives it the same name: then a failure brings the old one back.`,
    takesWords: true,
    run: async (host, flags) =>
      (await import("../node/switch.ts")).runSwitch(host, flags, terminalWidth()),
  },
  gc: {
    usage: "[--dry-run] [--network NAME] [--cni-config FILE] [--json]",
    summary: "collect what pods that are gone left: attachments, addresses, locks",
    help: `  --dry-run            show what there is, change nothing
  --network NAME       of one network
${cniConfigHelp}

Attachments whose DEL was given up, or whose pod is gone; addresses that host-local keeps for
nobody, of networks in the plugin table and on record; locks of dead processes. A pod that lives is
left alone: run it as root on the node, where pods can be seen. Status 1 when something remains.`,
    run: async (host, flags) =>
      (await import("../node/garbage.ts")).runGc(host, flags, terminalWidth()),
  },
  webhook: {
    usage: "--cert FILE --key FILE [--listen ADDRESS:PORT] [--kubeconfig FILE]",
    summary: "answer the API server whether a Logicalnetwork may be; see genie manifest --webhook",
    help: `  --cert FILE          the certificate in PEM
  --key FILE           its key; both are read again when they change
  --listen ADDR:PORT   where to listen, default 0.0.0.0:8443
  --kubeconfig FILE    how to ask the API; default: /etc/cni/genie/kubeconfig, else the service
                       account of the pod

POST /validate answers an AdmissionReview of admission.k8s.io/v1, GET /healthz says ok. Where the
API cannot be asked nothing is let through. Ends with SIGTERM or SIGINT.`,
    run: async (host, flags) => (await import("../kubernetes/webhook.ts")).runWebhook(host, flags),
  },
  version: {
    usage: "[--json]",
    summary: "show the version of genie and the CNI versions it speaks",
    help: "  --json               one JSON document, for programs",
    run: runVersion,
  },
  completion: {
    usage: "bash|zsh|fish",
    summary: "print what lets a shell complete these commands",
    help: `  bash                 . <(genie completion bash)
  zsh                  genie completion zsh > "\${fpath[1]}/_genie"
  fish                 genie completion fish | source`,
    takesWords: true,
    run: async (host, flags) => (await import("./command_line.ts")).runCompletion(host, flags),
  },
  report: {
    usage: "[pod NAMESPACE/NAME] [options]",
    summary: "show requests, networks, attachments and what failed, of the record",
    help: `  pod NAMESPACE/NAME   one pod: what it has, why, and each of its requests
  --since TIME         requests of the last 30m, 2h, 7d ...; default: all on record
  --network NAME       of one network
  --namespace NAME     of one namespace
  --pod NAME           of the pods of one name, or of NAMESPACE/NAME
  --command NAME       of ADD, DEL, CHECK, GC or STATUS
  --failed             failures alone
  --denied             failures by a rule alone
  --limit N            how many of the newest requests to list, default 20
  --csv                the rows themselves, for spreadsheets: all, unless there is a --limit
  --html FILE          a page for a browser: charts and tables, in one file
${cniConfigHelp}

  --cluster            all nodes as one: what the agent of each tells (agent.report of the table)
  --kubeconfig FILE    credentials to ask with; default: KUBECONFIG, ~/.kube/config, a pod's own
  --agents NAMESPACE   ask through the agents' pods there: needs list of pods and get of
                       pods/proxy in one namespace. Without it through the nodes: list of nodes
                       and get of nodes/proxy, which lets its holder reach every kubelet too;
                       genie manifest --features cluster-report prints both
  --selector LABELS    which nodes or pods, default kubernetes.io/os=linux or
                       app.kubernetes.io/name=genie
  --port PORT          where the agents listen, default 9477
  --endpoints URL,URL  ask these agents instead, without credentials
  --timeout TIME       what one node may take, default 15s

Reads the record and changes nothing. Attachments, addresses and traffic are of now. Of a cluster
--csv has a line for each node, --limit is at most 1000, and status 1 means that a node did not
answer: the report says which and why.`,
    takesWords: true,
    run: async (host, flags) => {
      const { readOwnConfig } = await import("../node/genie_config.ts");
      const { runReport } = await import("../report/command.ts");
      return runReport(host, flags, { width: terminalWidth(), readOwnConfig });
    },
  },
};

/** Path of this program's own file. @throws UsageError when it runs from source */
function ownProgram(): string {
  if (Bun.main.startsWith("/$bunfs/")) return process.execPath;
  throw new UsageError("Only the compiled program can install itself: bun run build");
}

/** Columns of the terminal; where output goes elsewhere nothing is cut. */
function terminalWidth(): number {
  return process.stdout.columns ?? Number.POSITIVE_INFINITY;
}

function runVersion(host: Host, flags: Flags): number {
  const document = { version: manifest.version, cniVersions: supportedVersions };
  const line = `genie ${manifest.version}, CNI ${supportedVersions.join(", ")}`;
  host.stdout(`${flags["json"] ? JSON.stringify(document) : line}\n`);
  return 0;
}
