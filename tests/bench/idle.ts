/**
 * A plugin that does nothing: with it a call costs what genie costs, and next to nothing else. On
 * x86-64 it is a program of a few hundred bytes, written here byte by byte, which needs neither a
 * compiler nor a library: it reads stdin to its end, prints a fixed answer to ADD and nothing to
 * all else, and ends with status 0. Elsewhere it is a script for tail(1) of two lines, which costs
 * the start of a small dynamic program and prints its answer whatever it is asked.
 */
import { writeFileSync } from "node:fs";

/** Writes the plugin; `answer` is what it prints to ADD, one line of JSON. */
export function writeIdlePlugin(path: string, answer: string): void {
  const script = Buffer.from(`#!/usr/bin/tail -n+2\n${answer}\n`);
  const program = process.arch === "x64" ? idleProgram(Buffer.from(`${answer}\n`)) : script;
  writeFileSync(path, program, { mode: 0o755 });
}

/** Where the file is mapped, and where there is room for what is read; both read by elf(5). */
const textAt = 0x400000;
const roomAt = 0x500000;
const roomSize = 0x1000;

/** The program as the bytes of an ELF file for x86-64: headers, code, answer. */
export function idleProgram(answer: Buffer): Buffer {
  const headersSize = 64 + 2 * 56;
  const answerAt = textAt + headersSize + idleCode(0, 0).length;
  const code = idleCode(answerAt, answer.length);
  const size = headersSize + code.length + answer.length;
  const header = Buffer.alloc(64);
  header.set([0x7f, 0x45, 0x4c, 0x46, 2, 1, 1]); // 64 bits, the lowest byte first
  header.writeUInt16LE(2, 16); // an executable
  header.writeUInt16LE(62, 18); // for x86-64
  header.writeUInt32LE(1, 20);
  header.writeBigUInt64LE(BigInt(textAt + headersSize), 24); // begins here
  header.writeBigUInt64LE(64n, 32); // the segments follow
  header.writeUInt16LE(64, 52);
  header.writeUInt16LE(56, 54);
  header.writeUInt16LE(2, 56);
  return Buffer.concat([
    header,
    segment({ flags: 5, at: textAt, fileSize: size, size }), // read and run
    segment({ flags: 6, at: roomAt, fileSize: 0, size: roomSize }), // read and write
    code,
    answer,
  ]);
}

function segment(one: { flags: number; at: number; fileSize: number; size: number }): Buffer {
  const bytes = Buffer.alloc(56);
  bytes.writeUInt32LE(1, 0); // to be loaded
  bytes.writeUInt32LE(one.flags, 4);
  bytes.writeBigUInt64LE(BigInt(one.at), 16);
  bytes.writeBigUInt64LE(BigInt(one.at), 24);
  bytes.writeBigUInt64LE(BigInt(one.fileSize), 32);
  bytes.writeBigUInt64LE(BigInt(one.size), 40);
  bytes.writeBigUInt64LE(0x1000n, 48);
  return bytes;
}

/** The machine code; what jumps says by how many bytes. */
function idleCode(answerAt: number, answerLength: number): Buffer {
  const number = (value: number) => {
    const bytes = Buffer.alloc(4);
    bytes.writeUInt32LE(value);
    return [...bytes];
  };
  const text = (eight: string) => [...Buffer.from(eight, "latin1")];
  const systemCall = [0x0f, 0x05];
  return Buffer.from([
    // read(0, room, size) until it returns 0 or an error
    ...[0x31, 0xc0], // xor eax, eax
    ...[0x31, 0xff], // xor edi, edi
    ...[0xbe, ...number(roomAt)], // mov esi, room
    ...[0xba, ...number(roomSize)], // mov edx, size
    ...systemCall,
    ...[0x85, 0xc0], // test eax, eax
    ...[0x7f, 0xec], // jg to the begin
    // the environment lies behind the arguments, whose count is on top of the stack
    ...[0x48, 0x8b, 0x04, 0x24], // mov rax, [rsp]
    ...[0x48, 0x8d, 0x5c, 0xc4, 0x10], // lea rbx, [rsp + 8 * rax + 16]
    // each variable, until one begins with CNI_COMM
    ...[0x48, 0x8b, 0x33], // mov rsi, [rbx]
    ...[0x48, 0x83, 0xc3, 0x08], // add rbx, 8
    ...[0x48, 0x85, 0xf6], // test rsi, rsi
    ...[0x74, 0x38], // je to the end
    ...[0x48, 0xb8, ...text("CNI_COMM")], // mov rax, "CNI_COMM"
    ...[0x48, 0x39, 0x06], // cmp [rsi], rax
    ...[0x75, 0xe5], // jne to the next variable
    // does it go on with AND=ADD?
    ...[0x48, 0xb8, ...text("AND=ADD\0")], // mov rax, "AND=ADD"
    ...[0x48, 0x8b, 0x4e, 0x08], // mov rcx, [rsi + 8]
    ...[0x48, 0x39, 0xc1], // cmp rcx, rax
    ...[0x75, 0x16], // jne to the end
    // write(1, answer, length)
    ...[0xb8, ...number(1)], // mov eax, 1
    ...[0xbf, ...number(1)], // mov edi, 1
    ...[0xbe, ...number(answerAt)], // mov esi, answer
    ...[0xba, ...number(answerLength)], // mov edx, length
    ...systemCall,
    // exit(0)
    ...[0xb8, ...number(60)], // mov eax, 60
    ...[0x31, 0xff], // xor edi, edi
    ...systemCall,
  ]);
}
