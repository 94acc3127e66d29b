/** Tests that need more than Bun: where that is missing they are skipped, and say why. */
import { describe, test } from "bun:test";
import { missing, type Need, reasonPrefix } from "./needs.ts";

/**
 * Why tests that need all this are skipped; undefined where they run. The end of `bun run test`
 * shows the reason beside the file. Call it at the top level of a test file:
 * `describe.skipIf(reasonToSkip("network namespaces", "nftables") !== undefined)(...)`.
 */
export function reasonToSkip(...needs: Need[]): string | undefined {
  const reason = missing(...needs);
  if (reason !== undefined) test.skip(`${reasonPrefix}${reason}`, () => undefined);
  return reason;
}

/** The same for who only asks whether: `test.skipIf(lacks("mounts"))(...)`. */
export function lacks(...needs: Need[]): boolean {
  return reasonToSkip(...needs) !== undefined;
}

/** `describe` and `test` for a file where everything needs all this, and whether it is absent. */
export function needing(...needs: Need[]) {
  const absent = lacks(...needs);
  return { absent, describe: describe.skipIf(absent), test: test.skipIf(absent) };
}
