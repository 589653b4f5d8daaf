/**
 * Clients for attacks.mjs that demand as much as they can: each runs as a process of its own, at full speed, until SIGTERM.
 * They write the protocol's bytes themselves, so that no library limits them. Owns their sockets.
 *
 *     node bench/attack-clients.mjs NAME SOCKET [EXPORT]
 */
import { spawnSync } from 'node:child_process';
import net from 'node:net';
import path from 'node:path';

const KIB = 2 ** 10;
const MIB = 2 ** 20;
const GIB = 2 ** 30;
const TIB = 2 ** 40;

const OPTION_MAGIC = Buffer.from('IHAVEOPT');
const OPT = { list: 3, go: 7, structuredReply: 8, setMetaContext: 10, extendedHeaders: 11 };
const REPLY_ACK = 1;
const CMD = { read: 0, write: 1, flush: 3, trim: 4, cache: 5, writeZeroes: 6, blockStatus: 7, disconnect: 2 };
const FAST_ZERO = 1 << 4;
const GREETING_BYTES = 18;
const OPTION_REPLY_BYTES = 20;
/** A reply without content, with extended headers. */
const CHUNK_BYTES = 32;
/** Requests or options that are sent in one write. */
const BATCH = 256;

class Client {
  #chunks = [];
  #bytes = 0;
  #wake;
  isThrownAway = false;

  static async connect(path) {
    const client = new Client();
    client.socket = net.connect(path);
    client.socket.on('error', () => undefined);
    client.closed = new Promise((resolve) => client.socket.once('close', resolve));
    client.socket.on('data', (chunk) => {
      if (client.isThrownAway) return;
      client.#chunks.push(chunk);
      client.#bytes += chunk.length;
      client.#wake?.();
    });
    client.socket.on('close', () => client.#wake?.());
    await new Promise((resolve, reject) => client.socket.once('connect', resolve).once('error', reject));
    return client;
  }

  /** The next `length` bytes received. */
  async read(length) {
    while (this.#bytes < length) {
      if (this.socket.destroyed) throw new Error('the server closed the connection');
      await new Promise((resolve) => (this.#wake = resolve));
    }
    const all = Buffer.concat(this.#chunks);
    this.#chunks = [all.subarray(length)];
    this.#bytes = all.length - length;
    return all.subarray(0, length);
  }

  /** Waits while the kernel's buffers are full. */
  async send(bytes) {
    if (this.socket.destroyed) throw new Error('the server closed the connection');
    if (!this.socket.write(bytes)) {
      await Promise.race([new Promise((resolve) => this.socket.once('drain', resolve)), this.closed]);
    }
  }

  async greet() {
    await this.read(GREETING_BYTES);
    await this.send(uint32(3));
  }

  /** The replies to an option, including the last one. */
  async option(option, data) {
    await this.send(optionBytes(option, data));
    for (;;) {
      const head = await this.read(OPTION_REPLY_BYTES);
      const type = head.readUInt32BE(12);
      await this.read(head.readUInt32BE(16));
      if (type === REPLY_ACK || type >= 2 ** 31) return type;
    }
  }

  /** A connection in the transmission phase on the export `name`. */
  static async open(path, name, { extended = true, contexts = [] } = {}) {
    const client = await Client.connect(path);
    client.extended = extended;
    await client.greet();
    if (extended) await client.option(OPT.extendedHeaders, Buffer.alloc(0));
    else await client.option(OPT.structuredReply, Buffer.alloc(0));
    if (contexts.length > 0) {
      const queries = contexts.map((context) => Buffer.concat([uint32(context.length), Buffer.from(context)]));
      const data = Buffer.concat([uint32(name.length), Buffer.from(name), uint32(contexts.length), ...queries]);
      await client.option(OPT.setMetaContext, data);
    }
    const type = await client.option(OPT.go, Buffer.concat([uint32(name.length), Buffer.from(name), uint16(0)]));
    if (type !== REPLY_ACK) throw new Error(`${name}: refused with ${type}`);
    return client;
  }

  request(type, offset, length, flags = 0) {
    const bytes = Buffer.alloc(this.extended ? 32 : 28);
    bytes.writeUInt32BE(this.extended ? 0x21e41c71 : 0x25609513, 0);
    bytes.writeUInt16BE(flags, 4);
    bytes.writeUInt16BE(type, 6);
    bytes.writeBigUInt64BE(BigInt(offset), 16);
    if (this.extended) bytes.writeBigUInt64BE(BigInt(length), 24);
    else bytes.writeUInt32BE(length, 24);
    return bytes;
  }

  /** Repeats the same requests as fast as the server takes them; discards the replies. */
  async flood(...requests) {
    this.isThrownAway = true;
    const batch = Buffer.concat(Array.from({ length: BATCH }, (_, index) => requests[index % requests.length]));
    for (;;) await this.send(batch);
  }
}

/** name -> what the attacker does with the server at `path`; it need not return. */
const ATTACKS = {
  async 'status-empty'(path) {
    const client = await Client.open(path, 'empty', { contexts: ['base:allocation'] });
    await client.flood(client.request(CMD.blockStatus, 0, 4 * TIB));
  },
  async 'status-fragmented'(path) {
    const client = await Client.open(path, 'holes', { contexts: ['base:allocation'] });
    await client.flood(client.request(CMD.blockStatus, 0, 256 * MIB));
  },
  async 'trim-empty'(path) {
    const client = await Client.open(path, 'empty');
    await client.flood(client.request(CMD.trim, 0, 4 * TIB));
  },
  async 'fast-zero'(path) {
    const client = await Client.open(path, 'empty');
    await client.flood(client.request(CMD.writeZeroes, 0, 4 * TIB, FAST_ZERO));
  },
  async cache(path) {
    const client = await Client.open(path, 'empty');
    await client.flood(client.request(CMD.cache, 0, 4 * TIB));
  },
  async changed(path) {
    const client = await Client.open(path, 'empty', { contexts: ['sheepgate:changed:s'] });
    await client.flood(client.request(CMD.blockStatus, 0, 4 * TIB));
  },
  async 'plain-4g'(path) {
    const client = await Client.open(path, 'empty', { extended: false, contexts: ['base:allocation'] });
    await client.flood(client.request(CMD.blockStatus, 0, 4 * GIB - 64 * KIB));
  },
  async 'bad-requests'(path) {
    const client = await Client.open(path, 'empty');
    await client.flood(client.request(CMD.read, 8 * TIB, 4 * KIB));
  },
  async 'read-unread'(path) {
    const clients = await Promise.all(Array.from({ length: 60 }, () => Client.open(path, 'data')));
    for (const client of clients) {
      client.socket.pause();
      void client.send(Buffer.concat(Array(BATCH).fill(client.request(CMD.read, 0, 32 * MIB)))).catch(() => undefined);
    }
  },
  async 'write-unfinished'(path) {
    const payload = Buffer.alloc(32 * MIB - 1, 1);
    const clients = await Promise.all(Array.from({ length: 50 }, () => Client.open(path, 'scratch')));
    for (const client of clients) {
      void client.send(client.request(CMD.write, 0, 32 * MIB)).catch(() => undefined);
      void client.send(payload).catch(() => undefined);
    }
  },
  async 'trim-full'(path) {
    const client = await Client.open(path, 'full');
    await client.flood(client.request(CMD.trim, 0, TIB));
  },
  async handshakes(path) {
    for (;;) {
      const clients = await Promise.allSettled(Array.from({ length: 64 }, () => Client.connect(path)));
      if (clients.some(({ status }) => status === 'rejected')) await new Promise((resolve) => setTimeout(resolve, 100));
    }
  },
  async options(path) {
    const bytes = Buffer.concat(Array(4096).fill(optionBytes(99, Buffer.alloc(0))));
    for (;;) {
      const client = await Client.connect(path);
      await client.greet();
      client.isThrownAway = true;
      await client.send(bytes).catch(() => undefined);
      await Promise.race([client.closed, new Promise((resolve) => setTimeout(resolve, 1000))]);
      client.socket.destroy();
    }
  },
  async list(path) {
    const one = async () => {
      for (;;) {
        const client = await Client.connect(path);
        await client.greet();
        await client.option(OPT.list, Buffer.alloc(0)).catch(() => undefined);
        client.socket.destroy();
      }
    };
    await Promise.all(Array.from({ length: 20 }, one));
  },
  /** Leaves so much unflushed data that closing the disk takes long. */
  async unflushed(path) {
    for (;;) {
      const client = await Client.open(path, 'scratch');
      client.isThrownAway = true;
      const page = Buffer.alloc(4 * KIB, 1);
      for (let at = 0; at < 64 * GIB; at += 4 * MIB) {
        await client.send(Buffer.concat([client.request(CMD.write, at, page.length), page]));
      }
      client.socket.end();
      await client.closed;
    }
  },
  /** In place, 32 at a time. */
  async 'slow-writes'(path) {
    const client = await Client.open(path, 'holes');
    await writeAtOnce(client, 32, (index) => (index % 32) * 8 * MIB);
  },
  async 'slow-new'(path) {
    const client = await Client.open(path, 'scratch');
    await writeAtOnce(client, 32, (index) => (index * 4 * MIB) % (64 * GIB));
  },
  async 'slow-syncs'(path) {
    const one = async (name) => {
      const client = await Client.open(path, name);
      for (;;) {
        await writeAtOnce(client, 16, (index) => index * 4 * MIB, 16);
        await client.send(client.request(CMD.flush, 0, 0));
        await client.read(CHUNK_BYTES);
      }
    };
    await Promise.all(Array.from({ length: 8 }, (_, index) => one(`flushed-${index}`)));
  },
  async 'vdi-list'(socketPath) {
    const command = path.join(import.meta.dirname, '../bin/sheepgate.cjs');
    for (;;) {
      const start = performance.now();
      spawnSync(process.execPath, [command, 'vdi', 'list', '--store', path.dirname(socketPath)], { stdio: 'ignore' });
      process.stderr.write(`vdi list: ${((performance.now() - start) / 1000).toFixed(1)} s\n`);
    }
  },
  async idle(path) {
    for (let count = 0; count < 1000; count++) {
      await Client.open(path, 'data').catch(() => undefined);
    }
  },
  /** Not an attack: connects, reads and leaves, again and again. Prints how long each visit took, in microseconds. */
  async visitor(path, name) {
    for (;;) {
      const start = performance.now();
      try {
        const client = await Client.open(path, name);
        await client.send(client.request(CMD.read, 0, 4 * KIB));
        await client.read(4 * KIB);
        console.log(Math.round((performance.now() - start) * 1000));
        client.socket.end(client.request(CMD.disconnect, 0, 0));
      } catch (error) {
        console.log(`failed: ${error.message}`);
      }
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
  },
};

/** Writes of 4 KiB, a fixed number in flight, until `total` of them are answered. */
async function writeAtOnce(client, depth, offsetOf, total = Infinity) {
  const page = Buffer.alloc(4 * KIB, 1);
  for (let sent = 0, answered = 0; answered < total; answered++) {
    for (; sent < Math.min(answered + depth, total); sent++) {
      await client.send(Buffer.concat([client.request(CMD.write, offsetOf(sent), page.length), page]));
    }
    await client.read(CHUNK_BYTES);
  }
}

function uint32(value) {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(value);
  return bytes;
}

function uint16(value) {
  const bytes = Buffer.alloc(2);
  bytes.writeUInt16BE(value);
  return bytes;
}

function optionBytes(option, data) {
  return Buffer.concat([OPTION_MAGIC, uint32(option), uint32(data.length), data]);
}

const [name, socketPath, exportName] = process.argv.slice(2);
const attack = ATTACKS[name];
if (attack === undefined || socketPath === undefined) {
  const usage = `usage: node bench/attack-clients.mjs ${Object.keys(ATTACKS).join('|')} SOCKET [EXPORT]\n`;
  const isAsked = name === '--help' || name === '-h';
  (isAsked ? process.stdout : process.stderr).write(usage);
  process.exit(isAsked ? 0 : 2);
}
// Continue after the server has closed the connection.
const keepAlive = setInterval(() => undefined, 1000);
process.on('SIGTERM', () => {
  clearInterval(keepAlive);
  process.exit(0);
});
for (;;) {
  try {
    await attack(socketPath, exportName);
    await new Promise(() => undefined);
  } catch (error) {
    if (process.env.ATTACK_DEBUG) console.error(error.message);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}
