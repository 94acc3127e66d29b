/**
 * Certificates for the TLS servers and clients of tests, so that these need no openssl: P-256,
 * valid from yesterday until tomorrow. Sources: RFC 5280 (certificates), X.690 (DER).
 */
import {
  createHash,
  createPrivateKey,
  createPublicKey,
  generateKeyPairSync,
  type KeyObject,
  randomBytes,
  sign,
} from "node:crypto";

/** A certificate and its key, as PEM. */
export interface Certificate {
  certificate: string;
  key: string;
}

/** Who signs a certificate. */
export interface Issuer {
  /** Its common name. */
  name: string;
  /** Its key, as PEM. */
  key: string;
}

/** What a certificate says of its holder. */
export interface Holder {
  /** The common name. */
  name: string;
  /** DNS names and IPv4 addresses of a server. */
  hosts?: readonly string[];
  /** Can a TLS client show it? */
  isClient?: boolean;
}

/** Makes a certificate with a new key: a CA where nobody issues it. */
export function makeCertificate(holder: Holder, issuer?: Issuer): Certificate {
  const { privateKey, publicKey } = generateKeyPairSync("ec", { namedCurve: "P-256" });
  const signer = issuer ? createPrivateKey(issuer.key) : privateKey;
  const ecdsaWithSha256 = sequence(objectId("1.2.840.10045.4.3.2"));
  const dayMs = 86_400_000;
  const toBeSigned = sequence(
    tagged(0xa0, integer(Buffer.from([2]))),
    integer(Buffer.concat([Buffer.from([1]), randomBytes(15)])),
    ecdsaWithSha256,
    commonName(issuer?.name ?? holder.name),
    sequence(utcTime(Date.now() - dayMs), utcTime(Date.now() + dayMs)),
    commonName(holder.name),
    publicKey.export({ format: "der", type: "spki" }),
    tagged(
      0xa3,
      sequence(
        ...extensions(holder, issuer === undefined),
        // Of two authorities with one name a client finds the right one by its key.
        extension("2.5.29.14", tagged(0x04, keyId(publicKey))),
        extension("2.5.29.35", sequence(tagged(0x80, keyId(createPublicKey(signer))))),
      ),
    ),
  );
  const signature = sign("sha256", toBeSigned, signer);
  const whole = sequence(toBeSigned, ecdsaWithSha256, tagged(0x03, Buffer.from([0]), signature));
  const lines = whole.toString("base64").match(/.{1,64}/g) ?? [];
  return {
    certificate: ["-----BEGIN CERTIFICATE-----", ...lines, "-----END CERTIFICATE-----", ""].join(
      "\n",
    ),
    key: privateKey.export({ format: "pem", type: "pkcs8" }).toString(),
  };
}

function extensions({ hosts, isClient }: Holder, isAuthority: boolean): Buffer[] {
  const yes = tagged(0x01, Buffer.from([0xff]));
  return [
    ...(isAuthority ? [extension("2.5.29.19", sequence(yes), yes)] : []),
    // keyCertSign is bit 5, so two bits of the byte are unused.
    ...(isAuthority ? [extension("2.5.29.15", tagged(0x03, Buffer.from([2, 0x04])), yes)] : []),
    ...(hosts ? [extension("2.5.29.17", sequence(...hosts.map(generalName)))] : []),
    ...(isClient ? [extension("2.5.29.37", sequence(objectId("1.3.6.1.5.5.7.3.2")))] : []),
  ];
}

function extension(id: string, value: Buffer, ...critical: Buffer[]): Buffer {
  return sequence(objectId(id), ...critical, tagged(0x04, value));
}

/** RFC 5280 §4.2.1.2, the first method. */
function keyId(key: KeyObject): Buffer {
  // The point on the curve ends the key's document: 65 bytes.
  const point = key.export({ format: "der", type: "spki" }).subarray(-65);
  return createHash("sha1").update(point).digest();
}

function generalName(host: string): Buffer {
  const isAddress = /^[\d.]+$/.test(host);
  if (isAddress) return tagged(0x87, Buffer.from(host.split(".").map(Number)));
  return tagged(0x82, Buffer.from(host));
}

function commonName(name: string): Buffer {
  const attribute = sequence(objectId("2.5.4.3"), tagged(0x0c, Buffer.from(name)));
  return sequence(tagged(0x31, attribute));
}

function utcTime(ms: number): Buffer {
  const digits = new Date(ms).toISOString().replace(/\D/g, "").slice(2, 14);
  return tagged(0x17, Buffer.from(`${digits}Z`));
}

/** A positive number: the first bit is the sign, so one more byte leads where it is set. */
function integer(bytes: Buffer): Buffer {
  const lead = (bytes[0] ?? 0) & 0x80 ? [0] : [];
  return tagged(0x02, Buffer.from(lead), bytes);
}

function objectId(id: string): Buffer {
  const [first = 0, second = 0, ...rest] = id.split(".").map(Number);
  const bytes = rest.flatMap((number) => {
    const groups = [number & 0x7f];
    for (let left = number >> 7; left > 0; left >>= 7) groups.unshift((left & 0x7f) | 0x80);
    return groups;
  });
  return tagged(0x06, Buffer.from([first * 40 + second, ...bytes]));
}

function sequence(...content: Buffer[]): Buffer {
  return tagged(0x30, ...content);
}

/** One DER value: its tag, its length, its content. */
function tagged(tag: number, ...content: Buffer[]): Buffer {
  const body = Buffer.concat(content);
  const { length } = body;
  const size =
    length < 0x80 ? [length] : length < 0x100 ? [0x81, length] : [0x82, length >> 8, length & 0xff];
  return Buffer.concat([Buffer.from([tag, ...size]), body]);
}
