/**
 * What strangers send instead of a ClientHello, to a server that reads it before OpenSSL does: every connection ends, with a
 * reason, and nothing else happens. The bytes are random, with a seed that a failure prints.
 */

import { randomInt } from 'node:crypto';
import { describe, expect, test } from 'vitest';
import { readClientHello } from '../src/protocol/client-hello.js';
import { clientHello, extension, list } from './client-hello.js';
import { Random } from './fuzz/random.js';
import { Authority } from './pki.js';
import { until } from './test-server.js';
import { acknowledged, startTlsServer } from './tls-server.js';

const KEY = Buffer.alloc(16, 7);
const SEED = Number(process.env['SEED'] ?? randomInt(2 ** 31));
const CONNECTIONS = 300;
const AT_ONCE = 20;

/** A ClientHello, and something done to it. */
function damaged(random: Random): Buffer {
  const identities = Array.from({ length: random.below(4) }, (_, i) =>
    random.pick(['alice', '', `user${i}`, 'x'.repeat(300)]),
  );
  const hello = clientHello({ identities, recordBytes: random.pick([16_384, 16_384, 100, 1]) });
  const at = random.below(hello.length);
  switch (random.below(6)) {
    case 0:
      return hello.subarray(0, at);
    case 1:
      return random.bytes(1 + random.below(2000));
    case 2:
      // It begins as one.
      return Buffer.concat([Buffer.from([22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3]), random.bytes(600)]);
    case 3:
      return Buffer.concat([hello, random.bytes(random.below(100_000))]);
    default:
      return random.mutate(hello);
  }
}

test(`every broken ClientHello ends its own connection, with a reason (SEED=${SEED})`, async () => {
  const random = new Random(SEED);
  const authority = await Authority.make('authority');
  const from = await startTlsServer({
    mode: 'require',
    authority: authority.pair.chain,
    limits: { maxViolationDelayMs: 0 },
    material: {
      certificate: authority.pair,
      verifyPeer: false,
      pskKey: (user) => new Promise((resolve) => setImmediate(resolve, user === 'alice' ? KEY : undefined)),
    },
  });
  for (let done = 0; done < CONNECTIONS; done += AT_ONCE) {
    const inputs = Array.from({ length: AT_ONCE }, () => ({
      bytes: damaged(random),
      // In pieces of so many bytes.
      step: random.pick([200_000, 200_000, 1 + random.below(200)]),
      vanishes: random.oneIn(4),
    }));
    await Promise.all(
      inputs.map(async ({ bytes, step, vanishes }) => {
        const raw = await acknowledged(from);
        for (let at = 0; at < bytes.length; at += step) raw.send(bytes.subarray(at, at + step));
        if (vanishes) raw.vanish();
        else {
          raw.halfClose();
          await raw.readToEnd();
        }
      }),
    );
  }
  await until(() => from.closes.length === CONNECTIONS, 'all connections are over');
  expect(from.closes.filter(({ reason }) => !/^(the TLS handshake failed|socket error): ./.test(reason))).toEqual([]);
  expect(from.errors).toEqual([]);
  expect(from.opens).toEqual([]);
  expect(from.server.connections.size).toBe(0);
  await (await from.connect({ psk: { user: 'alice', key: KEY } })).list();
}, 120_000);

describe('a ClientHello', () => {
  const read = (bytes: Buffer): unknown => {
    const hello = readClientHello(bytes);
    return typeof hello === 'string' ? hello : hello.identities.map(String);
  };

  test('names the users whose keys it offers, in one record or in several, whatever follows', () => {
    const identities = ['alice', 'bob'];
    for (const recordBytes of [16_384, 100, 50]) {
      const bytes = clientHello({ identities, recordBytes });
      expect(read(bytes)).toEqual(identities);
      expect(read(Buffer.concat([bytes, Buffer.alloc(100)]))).toEqual(identities);
      for (let length = 0; length < bytes.length; length++) expect(read(bytes.subarray(0, length))).toBe('incomplete');
    }
  });

  test('of TLS 1.2, without keys, or without the modes of their use names nobody', () => {
    expect(read(clientHello())).toEqual([]);
    expect(read(clientHello({ identities: ['alice'], versions: [0x0303] }))).toEqual([]);
    expect(read(clientHello({ identities: ['alice'], hasModes: false }))).toEqual([]);
  });

  test('that is too long, in too many records, or has an extension twice is left to OpenSSL', () => {
    expect(read(clientHello({ identities: ['alice'], recordBytes: 10 }))).toBe('unreadable');
    expect(read(clientHello({ extensions: [extension(21, Buffer.alloc(17_000))] }).subarray(0, 1000))).toBe(
      'unreadable',
    );
    expect(read(clientHello({ extensions: [extension(45, list(1, Buffer.from([1])))] }))).toBe('unreadable');
  });

  test('with any bytes is read or not, and nothing is thrown', () => {
    const random = new Random(SEED);
    for (let i = 0; i < 20_000; i++) readClientHello(damaged(random));
  });
});
