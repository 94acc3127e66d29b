/** What a pod may write to select networks, and what is refused. */
import { describe, expect, test } from "bun:test";
import { CniError } from "../lib/cni.ts";
import {
  attachmentsMax,
  parseElements,
  parseSelection,
  type Selection,
  type SelectionElement,
} from "../lib/pod.ts";

/** What a call throws, as the runtime sees it. */
function failure(act: () => unknown): { code: number; msg: string } {
  try {
    act();
  } catch (error) {
    if (!(error instanceof CniError)) throw error;
    return { code: error.code, msg: error.message };
  }
  return { code: 0, msg: "it did not fail" };
}

/** Elements as the annotation writes them. */
const formatElements = (elements: SelectionElement[]): string =>
  elements
    .map(({ network, ifName }) => network + (ifName === undefined ? "" : `@${ifName}`))
    .join();

describe("parseSelection()", () => {
  test.each<[string, Record<string, string>, Selection]>([
    ["nothing", {}, { kind: "default" }],
    ["annotations of others", { "example.com/cni": "a", CNI: "a" }, { kind: "default" }],
    ["networks without cni", { networks: "a" }, { kind: "default" }],
    ["one network", { cni: "a" }, { kind: "networks", elements: [{ network: "a" }] }],
    [
      "several, in their order",
      { cni: "b,a" },
      { kind: "networks", elements: [{ network: "b" }, { network: "a" }] },
    ],
    [
      "fact 34: the same one twice",
      { cni: "a@eth3,b,a" },
      {
        kind: "networks",
        elements: [{ network: "a", ifName: "eth3" }, { network: "b" }, { network: "a" }],
      },
    ],
    [
      "spaces and a last newline",
      { cni: " a , b @ eth1 \n" },
      { kind: "networks", elements: [{ network: "a" }, { network: "b", ifName: "eth1" }] },
    ],
    ["an empty cni", { cni: "" }, { kind: "choose" }],
    ["an empty cni with spaces", { cni: " \n", networks: " " }, { kind: "choose" }],
    [
      "an empty cni with logical networks",
      { cni: "", networks: "n1@eth0,n2" },
      { kind: "logical", elements: [{ network: "n1", ifName: "eth0" }, { network: "n2" }] },
    ],
    [
      "cni before networks",
      { cni: "a", networks: "../bad" },
      { kind: "networks", elements: [{ network: "a" }] },
    ],
  ])("%s", (_name, annotations, expected) => {
    expect(parseSelection(new Map(Object.entries(annotations)))).toEqual(expected);
  });

  test.each<[string, string, [string, string | undefined][]]>([
    [
      "the sample of CNI-Genie's releases",
      "net1:eth0,net2:eth4",
      [
        ["net1", "eth0"],
        ["net2", "eth4"],
      ],
    ],
    [
      "both signs, and spaces",
      "a : eth1, b@eth2,c",
      [
        ["a", "eth1"],
        ["b", "eth2"],
        ["c", undefined],
      ],
    ],
  ])("reads a colon in networks: %s", (_name, networks, expected) => {
    expect(parseSelection(new Map(Object.entries({ cni: "", networks })))).toEqual({
      kind: "logical",
      elements: expected.map(([network, ifName]) => ({ network, ...(ifName && { ifName }) })),
    });
  });

  test("a key that could change every object", () => {
    expect(parseSelection(new Map([["__proto__", "x"]]))).toEqual({ kind: "default" });
  });

  test.each<[string, Record<string, string>, string]>([
    ["a bad cni", { cni: "a,,b" }, 'annotation "cni": a name between commas is empty'],
    ["a colon in cni", { cni: "a:eth1" }, 'annotation "cni": "a:eth1" is not a network name'],
    ["two colons", { cni: "", networks: "a:eth1:2" }, 'it holds "/" or ":"'],
    ["a colon and a sign", { cni: "", networks: "a@eth1:2" }, 'it holds "/" or ":"'],
    ["nothing behind a colon", { cni: "", networks: "a:" }, "it is empty"],
    ["a bad networks", { cni: "", networks: "a b" }, 'annotation "networks": "a b" is not'],
  ])("refuses %s", (_name, annotations, part) => {
    expect(failure(() => parseSelection(new Map(Object.entries(annotations))))).toEqual({
      code: 7,
      msg: expect.stringContaining(part),
    });
  });
});

describe("parseElements()", () => {
  const names = (count: number) => Array.from({ length: count }, (_, i) => `n${i}`);
  test.each<[string, string, SelectionElement[]]>([
    ["one", "calico", [{ network: "calico" }]],
    ["every sign a name may have", "10-k8s_pod.Net", [{ network: "10-k8s_pod.Net" }]],
    ["an interface of 15 characters", "a@abcdefghijklmno", [named("a", "abcdefghijklmno")]],
    ["a name of 253 characters", "a".repeat(253), [{ network: "a".repeat(253) }]],
    ["32 networks", names(32).join(), names(32).map((network) => ({ network }))],
  ])("reads %s and formatElements() writes it", (_name, text, expected) => {
    expect(parseElements(text, "cni")).toEqual(expected);
    expect(formatElements(expected)).toBe(text);
  });

  function named(network: string, ifName: string): SelectionElement {
    return { network, ifName };
  }

  test.each([
    ["nothing", "", "a name between commas is empty"],
    ["a comma at the end", "a,", "a name between commas is empty"],
    ["an interface alone", "@eth0", '"" is not a network name'],
    ["a name that climbs", "../../etc/passwd", '"../../etc/passwd" is not a network name'],
    ["a namespace", "ns/a", '"ns/a" is not a network name'],
    ["a space within", "a b", '"a b" is not a network name'],
    ["a newline within", "a\nb", '"a b" is not a network name'],
    ["NUL", "a\0b", '"a b" is not a network name'],
    ["an escape sequence", "\u001b[31mred", '"[31mred" is not a network name'],
    ["letters of others", "кали", '"кали" is not a network name'],
    ["JSON", '[{"name":"a"}]', "is not a network name"],
    ["an option", "-a", '"-a" is not a network name'],
    ["a name of 254 characters", "a".repeat(254), "is not a network name"],
    ["an empty interface", "a@", '"" cannot name an interface for network "a": it is empty'],
    ["a long interface", "a@abcdefghijklmnop", "longer than 15 characters"],
    ["an interface that climbs", "a@../x", 'it holds "/" or ":"'],
    ["an alias", "a@eth0:1", 'it holds "/" or ":"'],
    ["an interface that is a folder", "a@..", "it is a folder name"],
    ["an interface of two words", "a@eth 0", "not printable ASCII"],
    ["a newline in an interface", "a@eth\n0", '"eth 0" cannot name an interface'],
    ["NUL in an interface", "a@eth\0", "not printable ASCII"],
    // The kernel would choose another name than the one on record.
    ["a pattern of the kernel", "a@eth%d", 'it holds "%"'],
    ["two interfaces", "a@eth1@eth2", '"eth1@eth2" cannot name an interface'],
    ["33 networks", names(33).join(), "it names 33 networks, at most 32 are allowed"],
    ["64 networks", names(64).join(), "it names 64 networks, at most 32 are allowed"],
    ["256 KiB of commas", ",".repeat(262_144), "it is longer than 8192 characters"],
    ["256 KiB of a name", "a".repeat(262_144), "it is longer than 8192 characters"],
  ])("refuses %s", (_name, text, part) => {
    const { code, msg } = failure(() => parseElements(text, "cni"));
    expect({ code, msg }).toEqual({ code: 7, msg: expect.stringContaining(part) });
    expect(msg).toStartWith('Invalid annotation "cni": ');
    // biome-ignore lint/suspicious/noControlCharactersInRegex: they are what must not be there
    expect(msg).not.toMatch(/[\u0000-\u001f]/);
    expect(msg.length).toBeLessThan(400);
  });

  test("the limit is the one of a pod", () => {
    expect(attachmentsMax).toBe(32);
  });
});
