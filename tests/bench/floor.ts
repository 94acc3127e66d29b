/**
 * The least that a compiled Bun program can do as a CNI plugin: read fd 0, write fd 1, exit. What
 * genie costs above this is genie's; what is below it is Bun's. The bench compiles it.
 */
import { readFileSync, writeSync } from "node:fs";

readFileSync(0);
writeSync(1, "{}\n");
process.exit(0);
