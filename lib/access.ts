/**
 * May this pod use this network? The one gate every network passes, however it was named.
 * Pure, and closed when in doubt. Source: design.md D9; NPWG §7.4.
 */

/** Who a rule names: glob patterns, lists OR-ed. `serviceAccounts`, `pods`: "namespace/name". */
export interface AccessRule {
  namespaces: string[];
  serviceAccounts: string[];
  pods: string[];
  /** Line of the rule in the plugin table. */
  line: number;
}

/** The part of the config that decides. */
export interface AccessConfig {
  /** Path of the plugin table, for {@link Decision.rule}. */
  file: string;
  /** What holds for a network without an allow rule. */
  access: { default: "allow" | "deny"; line?: number };
  plugins: ReadonlyMap<string, { allow?: AccessRule; deny?: AccessRule }>;
}

/** Who asks. A field that is "" or undefined is unknown; outside Kubernetes all are. */
export interface AccessPod {
  namespace?: string | undefined;
  name?: string | undefined;
  /** Name of the service account, without its namespace. */
  serviceAccount?: string | undefined;
}

/** The answer of {@link checkAccess}. */
export interface Decision {
  allowed: boolean;
  /** A clause for an error message: what allows it or stands against it. */
  reason: string;
  /** The rule that decided, as in `plugins.storage.allow at /etc/cni/genie/plugins.toml:12`. */
  rule?: string;
  /** Set when the pod's service account would decide and is not known. */
  needsServiceAccount?: true;
}

/**
 * Decides whether a pod may use a network.
 *
 * A matching deny rule wins. Then an allow rule opens the network to whom it names and closes it
 * to all others; without one `access.default` holds. What is unknown matches no pattern: a pod
 * without namespace passes no allow rule. A rule that hangs on a service account that a pod of
 * Kubernetes has, but that we do not know, denies.
 *
 * @param network name of the network, as in the plugin table
 */
export function checkAccess(config: AccessConfig, network: string, pod: AccessPod): Decision {
  const { allow, deny } = config.plugins.get(network) ?? {};
  const decide = (allowed: boolean, kind: "allow" | "deny", match: Match, line: number) => ({
    allowed,
    reason: `plugins.${network}.${kind}${match.text}`,
    rule: `plugins.${network}.${kind} at ${config.file}:${line}`,
    ...(match.kind === "unknown" && { needsServiceAccount: true as const }),
  });
  if (deny) {
    const match = matchRule(deny, pod);
    if (match.kind !== "no") return decide(false, "deny", match, deny.line);
  }
  if (allow) {
    const match = matchRule(allow, pod);
    return decide(match.kind === "yes", "allow", match, allow.line);
  }
  return config.access.default === "allow"
    ? { allowed: true, reason: 'access.default is "allow" and no rule speaks against it' }
    : {
        allowed: false,
        reason: 'access.default is "deny" and no rule allows it',
        rule: `access.default at ${config.file}:${config.access.line ?? 1}`,
      };
}

/** Whether a rule names a pod; `text` continues the name of the rule. */
type Match = { kind: "yes" | "no" | "unknown"; text: string };

function matchRule(rule: AccessRule, pod: AccessPod): Match {
  const { namespace = "", name = "", serviceAccount = "" } = pod;
  const byNamespace = rule.namespaces.find((pattern) => matchGlob(pattern, namespace));
  if (byNamespace !== undefined) return yes("namespaces", byNamespace);
  const byPod = rule.pods.find((pattern) => matchNamespaced(pattern, namespace, name));
  if (byPod !== undefined) return yes("pods", byPod);
  const byAccount = rule.serviceAccounts.find((pattern) =>
    matchNamespaced(pattern, namespace, serviceAccount),
  );
  if (byAccount !== undefined) return yes("service_accounts", byAccount);
  const open = rule.serviceAccounts.find(
    // Unknown, and the pattern names some account of the pod's namespace.
    (pattern) => serviceAccount === "" && matchGlob(pattern.split("/")[0] ?? "", namespace),
  );
  if (open === undefined) return { kind: "no", text: ` does not name ${describePod(pod)}` };
  const text = `.service_accounts "${open}" needs the service account of ${describePod(pod)}`;
  return { kind: "unknown", text: `${text}, which is not known` };
}

function yes(list: string, pattern: string): Match {
  return { kind: "yes", text: `.${list} "${pattern}" names it` };
}

function describePod({ namespace = "", name = "", serviceAccount = "" }: AccessPod): string {
  if (namespace === "") return "a pod without namespace";
  const account = serviceAccount === "" ? "" : ` of service account "${serviceAccount}"`;
  return `pod "${namespace}/${name}"${account}`;
}

function matchNamespaced(pattern: string, namespace: string, name: string): boolean {
  const [namespacePattern = "", namePattern = "", ...more] = pattern.split("/");
  if (more.length > 0) return false;
  return matchGlob(namespacePattern, namespace) && matchGlob(namePattern, name);
}

/**
 * True when `pattern` covers all of `text`: `*` is any run of characters, `?` any one.
 * An unknown text, "", is covered by nothing. Only the last `*` is ever tried again, so that the
 * steps are at most pattern × text, both bounded by the config and by Kubernetes.
 */
export function matchGlob(pattern: string, text: string): boolean {
  if (text === "") return false;
  let p = 0;
  let t = 0;
  let star = -1;
  let starText = 0;
  while (t < text.length) {
    if (pattern[p] === "*") {
      star = p++;
      starText = t;
    } else if (pattern[p] === "?" || pattern[p] === text[t]) {
      p++;
      t++;
    } else if (star >= 0) {
      p = star + 1;
      t = ++starText;
    } else return false;
  }
  while (pattern[p] === "*") p++;
  return p === pattern.length;
}
