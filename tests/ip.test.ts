/** `lib/ip.ts` against `node:net`, which it stands in for. */
import { describe, expect, test } from "bun:test";
import { BlockList, isIP as nodeIsIP } from "node:net";
import { contains, isIP, parseSubnet, toNumber } from "../lib/ip.ts";

const texts = [
  ...["0.0.0.0", "10.1.2.3", "255.255.255.255", "256.1.1.1", "1.2.3", "01.2.3.4", "1.2.3.4.5"],
  ...["::", "::1", "fd00::5", "2001:db8::8888:1", "1:2:3:4:5:6:7:8", "1::2::3", "::ffff:1.2.3.4"],
  ...["", "a", ":", "1:2", "g::1", "1:2:3:4:5:6:7:8:9", "12345::", "::1/64", " ::1", "[::1]"],
];

describe("isIP()", () => {
  test.each(texts)("agrees with node:net on %p", (text) => {
    expect(isIP(text)).toBe(nodeIsIP(text) as 0 | 4 | 6);
  });
  test("takes no zone: it names an interface of another machine", () => {
    expect(isIP("fe80::1%eth0")).toBe(0);
  });
});

describe("toNumber()", () => {
  test.each<[unknown, bigint | undefined]>([
    ["0.0.1.2", 258n],
    ["::1:2", 65538n],
    ["::ffff:1.2.3.4", 0xffff01020304n],
    ["ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 2n ** 128n - 1n],
    ["x", undefined],
    [1, undefined],
  ])("of %p", (text, expected) => {
    expect(toNumber(text)).toBe(expected);
  });
});

describe("contains()", () => {
  const subnets = ["10.0.0.0/8", "10.1.0.0/16", "10.1.2.77/24", "10.1.2.3/32", "0.0.0.0/0"].concat([
    "fd00::/8",
    "fd00:1::/32",
    "::/0",
    "fd00:1::5/128",
  ]);
  const pairs = subnets.flatMap((outer) => subnets.map((inner) => [outer, inner] as const));
  test.each(pairs)("%s has %s as node:net says", (outer, inner) => {
    const [address = "", prefix = ""] = outer.split("/");
    const [host = "", length = ""] = inner.split("/");
    const list = new BlockList();
    const family = (text: string) => (text.includes(":") ? "ipv6" : "ipv4") as "ipv4" | "ipv6";
    list.addSubnet(address, Number(prefix), family(outer));
    const expected =
      family(outer) === family(inner) &&
      Number(length) >= Number(prefix) &&
      list.check(host, family(inner));
    expect(contains(outer, inner)).toBe(expected);
  });
  test.each(["10.0.0.0", "10.0.0.0/33", "x/8", "::/129", ""])("refuses %p", (text) => {
    expect(parseSubnet(text)).toBeUndefined();
    expect(contains("0.0.0.0/0", text)).toBe(false);
  });
});
