#!/usr/bin/env node
/**
 * Records what a real node answers, for layouts.test.ts: `node test/sheep/record.mjs HOST PORT > test/sheep/fixtures/node.json`.
 * Creates a VDI and a snapshot of it, writes a little, and deletes nothing. It has its own copy of the protocol, so that it
 * does not repeat mistakes of the code that it checks. Zeros at the end of payloads are left out.
 */
import net from 'node:net';

const [host = '127.0.0.1', port = '7000'] = process.argv.slice(2);
if (host.startsWith('-') || !/^\d{1,5}$/.test(port)) {
  const isAsked = host === '--help' || host === '-h';
  (isAsked ? process.stdout : process.stderr).write('usage: node test/sheep/record.mjs [HOST [PORT]] > FILE\n');
  process.exit(isAsked ? 0 : 2);
}
const socket = net.connect(Number(port), host);
const waiting = [];
let buffered = Buffer.alloc(0);
socket.on('data', (chunk) => {
  buffered = Buffer.concat([buffered, chunk]);
  while (buffered.length >= 48 && buffered.length >= 48 + buffered.readUInt32LE(12)) {
    const end = 48 + buffered.readUInt32LE(12);
    waiting.shift()?.(buffered.subarray(0, end));
    buffered = buffered.subarray(end);
  }
});

const records = [];

/** Sends one request at a time. `fields`: [offset, bytes, value]. */
async function ask(label, opcode, flags, fields, { data, receive = 0 } = {}) {
  const header = Buffer.alloc(48);
  header[0] = opcode < 0x80 ? 2 : 0x0a;
  header[1] = opcode;
  header.writeUInt16LE(flags, 2);
  header.writeUInt32LE(records.length + 1, 8);
  header.writeUInt32LE(data?.length ?? receive, 12);
  for (const [offset, bytes, value] of fields) {
    if (bytes === 8) header.writeBigUInt64LE(BigInt(value), offset);
    else header.writeUIntLE(value, offset, bytes);
  }
  socket.write(data ? Buffer.concat([header, data]) : header);
  const answer = await new Promise((resolve) => waiting.push(resolve));
  const payload = answer.subarray(48);
  let end = payload.length;
  while (end > 0 && payload[end - 1] === 0) end--;
  records.push({
    label,
    request: header.toString('hex'),
    response: answer.subarray(0, 48).toString('hex'),
    payloadLength: payload.length,
    payload: payload.subarray(0, Math.min(end, 8192)).toString('hex'),
  });
  return answer;
}

function named(name, tag) {
  const data = Buffer.alloc(tag === undefined ? 256 : 512);
  data.write(name);
  if (tag !== undefined) data.write(tag, 256);
  return data;
}

const WRITE = 1;
const name = `recorded-${process.pid}`;
const inode = (vid) => (1n << 63n) | (BigInt(vid) << 32n);
const vidOf = (answer) => answer.readUInt32LE(24);
const size = 40 * 2 ** 20;

await ask('cluster info', 0xbe, 0, [], { receive: 512 * 1024 });
await ask('node list', 0x82, 0, [], { receive: 6144 * 80 });
await ask('lookup of nothing', 0x14, WRITE, [], { data: named(`${name}-none`, '') });
const vid = vidOf(
  await ask(
    'new VDI',
    0x11,
    WRITE,
    [
      [16, 8, size],
      [31, 1, 22],
    ],
    { data: named(name) },
  ),
);
await ask(
  'create',
  0x01,
  WRITE,
  [
    [16, 8, BigInt(vid) << 32n],
    [40, 4, 1024],
  ],
  { data: Buffer.alloc(512, 7) },
);
const entry = Buffer.alloc(4);
entry.writeUInt32LE(vid);
await ask(
  'entry',
  0x03,
  WRITE,
  [
    [16, 8, inode(vid)],
    [40, 4, 4664],
  ],
  { data: entry },
);
await ask(
  'tag',
  0x03,
  WRITE,
  [
    [16, 8, inode(vid)],
    [40, 4, 256],
  ],
  { data: named('monday') },
);
const next = vidOf(
  await ask(
    'snapshot',
    0x11,
    WRITE,
    [
      [16, 8, size],
      [24, 4, vid],
      [31, 1, 22],
      [32, 4, 1],
    ],
    { data: named(name) },
  ),
);
await ask('lookup', 0x14, WRITE, [], { data: named(name, '') });
await ask('inode of the snapshot', 0x02, 0, [[16, 8, inode(vid)]], { receive: 572 });
await ask('inode of the working VDI', 0x02, 0, [[16, 8, inode(next)]], { receive: 572 });
await ask(
  'counts of the snapshot',
  0x02,
  0,
  [
    [16, 8, inode(vid)],
    [40, 4, 4198968],
  ],
  { receive: 8 },
);
await ask(
  'counts of the working VDI',
  0x02,
  0,
  [
    [16, 8, inode(next)],
    [40, 4, 4198968],
  ],
  { receive: 8 },
);
await ask('write to the snapshot', 0x03, WRITE, [[16, 8, BigInt(vid) << 32n]], { data: Buffer.alloc(512) });
await ask('read', 0x02, 0, [[16, 8, BigInt(vid) << 32n]], { receive: 2048 });
await ask('read of nothing', 0x02, 0, [[16, 8, (BigInt(vid) << 32n) | 9n]], { receive: 512 });
socket.end();
process.stdout.write(`${JSON.stringify({ name, size, records }, null, 1)}\n`);
