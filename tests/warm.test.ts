/** What is made ready while the first delegate runs: it must work, and change nothing. */
import { expect, test } from "bun:test";
import { join } from "node:path";
import { warmUp } from "../lib/attach.ts";
import { closeState } from "../lib/database.ts";
import { openState } from "../lib/recovery/database.ts";
import { makeHost, tempDir } from "./fakes.ts";

test("warmUp() runs, and leaves the record as it was", () => {
  using dir = tempDir();
  const host = makeHost({ level: "debug" });
  const state = openState(host, join(dir.path, "state"));
  try {
    const before = state.database.serialize();
    warmUp(host, state);
    expect(state.database.serialize().equals(before)).toBe(true);
    expect(host.written.stderr).toBe("");
  } finally {
    closeState(state);
  }
});

test("warmUp() fails nothing, whatever the record has become", () => {
  using dir = tempDir();
  const host = makeHost({ level: "debug" });
  const state = openState(host, join(dir.path, "state"));
  try {
    state.database.run("DROP TABLE ledger");
    warmUp(host, state);
    expect(host.written.stderr).toBe("genie: debug: Internal error: no such table: ledger\n");
  } finally {
    closeState(state);
  }
});
