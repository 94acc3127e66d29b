/** Our own CNI config, as the runtime finds it: it tells an operator's command of the node. */
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { CniError, code, isNetworkName, isSupported, type StdinConfig } from "../cni.ts";
import { isObject, parseJson } from "../json.ts";

const confDirDefault = "/etc/cni/net.d";

/**
 * Our own CNI config: of the file named, else of the first list in the conf dir that calls genie,
 * else one with nothing set.
 *
 * @throws CniError 5 when the file named cannot be read, 6 or 7 when it is no config of genie
 */
export function readOwnConfig(file: string | undefined): StdinConfig {
  if (file !== undefined) {
    const own = ownConfigOf(readText(file), file);
    if (own) return own;
    throw new CniError(
      code.invalidConfig,
      `Invalid CNI config ${file}: no plugin has type "genie"`,
    );
  }
  for (const path of confFiles(confDirDefault)) {
    try {
      const own = ownConfigOf(readText(path), path);
      if (own) return own;
    } catch (error) {
      // Files of others may be broken; validate reports those that a network needs.
      if (!(error instanceof CniError)) throw error;
    }
  }
  return { cniVersion: "1.1.0", name: "genie", type: "genie" };
}

function confFiles(dir: string): string[] {
  try {
    return readdirSync(dir)
      .filter((name) => /\.(conflist|conf|json)$/.test(name))
      .sort()
      .map((name) => join(dir, name));
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return [];
    throw error;
  }
}

function readText(path: string): string {
  try {
    return readFileSync(path, "utf8");
  } catch (error) {
    const reason = (error as NodeJS.ErrnoException).code;
    throw new CniError(code.ioFailure, `Cannot read ${path}: ${reason}`, { cause: error });
  }
}

function ownConfigOf(content: string, path: string): StdinConfig | undefined {
  const value = parseJson(content, path);
  if (!isObject(value)) return undefined;
  const plugins = Array.isArray(value["plugins"]) ? value["plugins"] : [value];
  const own = plugins.find((plugin) => isObject(plugin) && plugin["type"] === "genie");
  if (!isObject(own)) return undefined;
  const name = value["name"];
  if (!isNetworkName(name)) {
    throw new CniError(code.invalidConfig, `Invalid CNI config ${path}: "name" is not valid`);
  }
  const cniVersion = isSupported(value["cniVersion"]) ? value["cniVersion"] : "1.1.0";
  return { ...own, name, cniVersion };
}
