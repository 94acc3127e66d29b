/**
 * Builds the standalone binary: `bun run build [--target=bun-linux-arm64]` → `dist/genie`.
 * The two `--no-compile-autoload-*` flags matter: the binary runs as root in whatever folder the
 * runtime happens to be in, and must read nothing from it.
 */
import { dirname, join } from "node:path";

const root = dirname(import.meta.dir);
const args = [
  process.execPath,
  "build",
  "--compile",
  "--minify",
  "--bytecode",
  "--splitting",
  "--format=esm",
  "--no-compile-autoload-dotenv",
  "--no-compile-autoload-bunfig",
  ...process.argv.slice(2),
  "--outfile=dist/genie",
  "genie.ts",
];
const { exitCode } = Bun.spawnSync(args, { cwd: root, stdio: ["ignore", "inherit", "inherit"] });
if (exitCode !== 0) throw new Error(`bun build failed with exit code ${exitCode} in ${join(root)}`);
