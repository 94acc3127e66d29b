/** Every call that was made, held against what the ledger tells of them. */
import { Database } from "bun:sqlite";
import type { WireResult } from "../fixtures/quirks/node.ts";

/** One call of genie as its caller saw it. */
export interface Told {
  containerId: string;
  command: string;
  /** 0 for a success; undefined where a signal ended it before it had answered. */
  code: number | undefined;
  msg: string;
  /** What a successful ADD answered. */
  result: WireResult | undefined;
}

interface Row {
  kind: string;
  command: string;
  container_id: string;
  network: string;
  ifname: string;
  outcome: string;
  code: number;
  error: string;
  addresses: string;
}

const errorLengthMax = 1024;

/**
 * What the ledger does not tell, or tells wrongly. Each call that answered is one row, with its
 * outcome, code and error; a DEL with nothing to do is none. A call that was killed may be missing,
 * or be there when it was killed after its end; its networks are told of by who undid them.
 */
export function contradictions(databaseFile: string, story: readonly Told[]): string[] {
  using database = new Database(databaseFile, { readonly: true });
  const rows = database.query("SELECT * FROM ledger ORDER BY id").all() as Row[];
  const told = Map.groupBy(story, ({ containerId }) => containerId);
  const written = Map.groupBy(rows, ({ container_id }) => container_id);
  const strange = [...written.keys()].filter((id) => !told.has(id));
  return [
    ...strange.map((id) => `${id}: rows of a container that nobody asked for`),
    ...[...told].flatMap(([id, calls]) =>
      ofContainer(calls, written.get(id) ?? []).map((issue) => `${id}: ${issue}`),
    ),
  ];
}

const shown = (command: string, code: number, error: string): string =>
  `${command} ${code} ${error.slice(0, errorLengthMax)}`.trim();

function ofContainer(calls: readonly Told[], rows: readonly Row[]): string[] {
  const issues: string[] = [];
  const own = rows.filter(({ kind }) => kind === "call");
  const left = own.map((row) => shown(row.command, row.code, row.error));
  const take = (text: string): boolean => {
    const at = left.indexOf(text);
    if (at >= 0) left.splice(at, 1);
    return at >= 0;
  };
  for (const { command, code, msg } of calls) {
    if (code === undefined) continue;
    const text = shown(command, code, msg);
    if (!take(text) && text !== "DEL 0") issues.push(`no row of: ${text}`);
  }
  const killed = calls.filter(({ code }) => code === undefined);
  for (const text of left) {
    const at = killed.findIndex(({ command }) => text.startsWith(`${command} `));
    if (at < 0) issues.push(`a row of a call that nobody made: ${text}`);
    else killed.splice(at, 1);
  }
  const count = (text: string) => own.filter(({ command, code }) => `${command} ${code}` === text);
  const [adds, dels] = [count("ADD 0").length, count("DEL 0").length];
  if (dels < adds) issues.push(`${adds} ADDs succeeded, ${dels} DELs tell of their end`);
  for (const call of calls) issues.push(...networkIssues(call, rows));
  for (const { outcome, code } of rows) {
    if ((outcome === "ok") !== (code === 0)) issues.push(`a row is ${outcome} with code ${code}`);
  }
  return issues;
}

/** Each interface of a result is a row of its network, with the same addresses. */
function networkIssues({ result }: Told, rows: readonly Row[]): string[] {
  const { interfaces = [], ips = [] } = result ?? {};
  const found = interfaces.flatMap(({ name, sandbox }, i) => {
    if (!sandbox) return [];
    const own = ips.filter((ip) => ip.interface === i).map(({ address }) => address);
    return [`${name} ${own.join(",")}`];
  });
  const ok = rows.filter(
    ({ kind, command, code }) => kind === "network" && command === "ADD" && code === 0,
  );
  const told = new Set(ok.map(({ ifname, addresses }) => `${ifname} ${addresses}`));
  return found.filter((one) => !told.has(one)).map((one) => `no row of the network on ${one}`);
}
