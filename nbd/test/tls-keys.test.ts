/**
 * The program's `material` and `pskKey`: both may answer later, and whatever else they do, one connection ends with a reason that
 * names them, the program is told, and everybody else goes on.
 */

import { execFile } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import tls from 'node:tls';
import { promisify } from 'node:util';
import { beforeAll, describe, expect, onTestFinished, test } from 'vitest';
import type { Limits, NbdClient, TlsMaterial } from '../src/index.js';
import { OPT } from '../src/protocol/wire.js';
import { clientHello } from './client-hello.js';
import { connectedEnds } from './pair-end.js';
import { Authority, type Pair } from './pki.js';
import { infoQuery, RawClient, uint32 } from './raw-client.js';
import { Gate } from './test-device.js';
import { temporaryDirectory, until } from './test-server.js';
import { acknowledged, failure, rawInTls, startTlsServer, type TlsServer } from './tls-server.js';

const KEY = Buffer.from('00112233445566778899aabbccddeeff', 'hex');
const ALICE = { psk: { user: 'alice', key: KEY } };
const TICK = (): Promise<void> => new Promise((resolve) => setImmediate(resolve));

let authority: Authority;
let server: Pair;
let client: Pair;

beforeAll(async () => {
  authority = await Authority.make('authority');
  server = await authority.sign(['CN = localhost'], ['DNS.1 = localhost', 'IP.1 = 127.0.0.1']);
  client = await authority.sign(['O = Example']);
});

function start(material: Partial<TlsMaterial> = {}, limits: Partial<Limits> = {}): Promise<TlsServer> {
  const initial = { certificate: server, verifyPeer: false, ...material };
  return startTlsServer({ mode: 'require', material: initial, authority: authority.pair.chain, limits });
}

/** A server whose pskKey is this, whatever it is. */
function startKeys(pskKey: (user: string) => unknown, limits: Partial<Limits> = {}): Promise<TlsServer> {
  return start({ certificate: undefined, pskKey: pskKey as TlsMaterial['pskKey'] }, limits);
}

/** The reason why the server ended the next connection. */
async function reasonOf(from: TlsServer, attempt: Promise<unknown>): Promise<string> {
  const before = from.closes.length;
  expect(['TLS_FAILED', 'CLOSED']).toContain((await failure(attempt)).code);
  await until(() => from.closes.length > before, 'the connection is over');
  return from.closes[before]?.reason ?? '';
}

/** It reads what is on the disk. */
async function works(connected: NbdClient): Promise<void> {
  await connected.go('disk');
  expect(await connected.read(4, 4)).toEqual(uint32(5));
}

const thenable = (then: (resolve: (value: unknown) => void, reject: (error: unknown) => void) => void): object => ({
  then,
});
const unprintable = {
  get message(): string {
    throw new Error('no message');
  },
  toString(): string {
    throw new Error('no text');
  },
  toJSON(): string {
    throw new Error('no JSON');
  },
};
const thrower = (error: unknown) => (): never => {
  throw error;
};
const never = (): Promise<never> => new Promise(() => undefined);

describe('material', () => {
  test('may be a promise, and bytes may be any Uint8Array', async () => {
    const bytes = (text: string): Uint8Array => new TextEncoder().encode(text);
    const chain = authority.pair.chain;
    const from = await start({
      certificate: { chain: bytes(server.chain), key: bytes(server.key) },
      authorities: bytes(chain),
      verifyPeer: true,
    });
    for (const supply of [
      () => from.material,
      () => Promise.resolve(from.material),
      () => TICK().then(() => from.material),
      () => thenable((resolve) => setImmediate(resolve, from.material)),
    ]) {
      from.supply = supply;
      await works(
        await from.connect({
          authorities: bytes(chain),
          certificate: { chain: bytes(client.chain), key: bytes(client.key) },
        }),
      );
      expect(from.opens.at(-1)?.peer.tls?.certificate?.subject).toEqual([{ type: 'O', value: 'Example', rdn: 0 }]);
    }
    expect(from.errors).toEqual([]);
  });

  test('that comes later than the ClientHello loses none of its bytes', async () => {
    for (const pskKey of [undefined, (): Buffer => KEY, (): Promise<Buffer> => Promise.resolve(KEY)]) {
      const from = await start({ pskKey });
      const gate = new Gate();
      let isAsked = false;
      from.supply = () => {
        isAsked = true;
        return gate.opened.then(() => from.material);
      };
      const connecting = from.connect(pskKey ? ALICE : undefined);
      await until(() => isAsked, 'the server needs its keys');
      for (let i = 0; i < 20; i++) await TICK();
      gate.open();
      await works(await connecting);
    }
  });

  const wrong: readonly (readonly [string, () => unknown, RegExp])[] = [
    ['throws', thrower(new TypeError('no keys today')), /material\(\) threw TypeError: no keys today$/],
    ['throws undefined', thrower(undefined), /material\(\) threw undefined$/],
    ['throws what cannot be shown', thrower(unprintable), /material\(\) threw an object that cannot be shown$/],
    [
      'rejects',
      () => Promise.reject(new Error('vault is sealed')),
      /material\(\) rejected with Error: vault is sealed$/,
    ],
    ['rejects with nothing', () => TICK().then(thrower(undefined)), /material\(\) rejected with undefined$/],
    ['throws in then', () => ({ then: thrower(new Error('in then')) }), /material\(\) rejected with Error: in then$/],
    [
      'throws when then is read',
      () => ({
        get then(): never {
          throw new Error('no then');
        },
      }),
      /material\(\) threw Error: no then$/,
    ],
    [
      'throws when anything is read',
      () => new Proxy({}, { get: (_, name) => (name === 'then' ? undefined : thrower(new Error('a trap'))()) }),
      /material\(\) threw Error: a trap$/,
    ],
    ['returns nothing', () => undefined, /material\(\) returned undefined; expected was TlsMaterial$/],
    ['resolves to null', () => Promise.resolve(null), /material\(\) returned null; expected was TlsMaterial$/],
    [
      'returns a string',
      () => server.chain,
      /material\(\) returned a string of \d+ characters; expected was TlsMaterial$/,
    ],
    ['returns no keys', () => ({ verifyPeer: false }), /material\(\) returned neither certificate nor pskKey; /],
    ['does not say verifyPeer', () => ({ certificate: server }), /material\(\) returned undefined as verifyPeer; /],
    [
      'returns a certificate that is none',
      () => ({ certificate: server.chain, verifyPeer: false }),
      /material\(\) returned a string of \d+ characters as certificate; expected was \{ chain, key \}$/,
    ],
    [
      'returns no private key',
      () => ({ certificate: { chain: server.chain }, verifyPeer: false }),
      /material\(\) returned undefined as certificate.key; expected was PEM, as a string or bytes$/,
    ],
    [
      'returns a chain that is not PEM',
      () => ({ certificate: { ...server, chain: 'nonsense' }, verifyPeer: false }),
      /material\(\) returned certificate.chain that has no line "-----BEGIN ...-----"; expected was PEM$/,
    ],
    [
      'returns a chain that is damaged',
      () => ({ certificate: { ...server, chain: server.chain.replaceAll(/[a-z]/g, 'A') }, verifyPeer: false }),
      /material\(\) returned certificate.chain that OpenSSL does not take: /,
    ],
    [
      'returns a key that is damaged',
      () => ({ certificate: { ...server, key: server.key.slice(0, 60) }, verifyPeer: false }),
      /material\(\) returned certificate.key that OpenSSL does not take: /,
    ],
    [
      'returns the key of another certificate',
      () => ({ certificate: { ...server, key: client.key }, verifyPeer: false }),
      /OpenSSL does not take what material\(\) returned: .*key values mismatch/,
    ],
    [
      'returns revocations that are none',
      () => ({ certificate: server, authorities: server.chain, revocations: server.chain, verifyPeer: true }),
      /material\(\) returned revocations that OpenSSL does not take: /,
    ],
    [
      'returns a pskKey that is none',
      () => ({ pskKey: KEY, verifyPeer: false }),
      /material\(\) returned a Buffer as pskKey; expected was a function \(user\) => key$/,
    ],
    // Node would trust all authorities of the system, and check no revocations.
    [
      'returns empty authorities',
      () => ({ certificate: server, authorities: '', verifyPeer: true }),
      /material\(\) returned authorities that is empty; expected was PEM$/,
    ],
    [
      'returns empty revocations',
      () => ({ certificate: server, authorities: server.chain, revocations: Buffer.alloc(0), verifyPeer: true }),
      /material\(\) returned revocations that is empty; expected was PEM$/,
    ],
  ];
  test.for(wrong)('that %s ends one connection', async ([, supply, reason]) => {
    const from = await start();
    const other = await from.connect();
    await other.go('disk');
    from.supply = supply;
    expect(await reasonOf(from, from.connect())).toMatch(reason);
    expect(from.closes[0]?.reason).toMatch(/^the TLS handshake failed: /);
    expect(from.errors.map((error) => (error as Error).message)).toEqual([expect.stringMatching(reason)]);
    from.supply = () => from.material;
    await works(await from.connect());
    expect(await other.read(4, 4)).toEqual(uint32(5));
  });

  test('that never settles ends the connection after openTimeoutMs, and says so', async () => {
    const from = await start({}, { openTimeoutMs: 100 });
    from.supply = never;
    expect(await reasonOf(from, from.connect())).toBe('the server has not got its keys from material() within 100 ms');
    expect(from.server.connections.size).toBe(0);
  });

  test('that settles twice counts once', async () => {
    const from = await start();
    for (const supply of [
      () =>
        thenable((resolve, reject) => {
          resolve(from.material);
          resolve(null);
          reject(new Error('later'));
        }),
      () =>
        thenable((resolve) => {
          resolve(from.material);
          throw new Error('after all');
        }),
    ]) {
      from.supply = supply;
      await works(await from.connect());
    }
    expect(from.errors).toEqual([]);
  });
});

describe('pskKey', () => {
  const answers: readonly (readonly [string, (user: string) => unknown])[] = [
    ['a Buffer', () => KEY],
    ['a Uint8Array', () => new Uint8Array(KEY)],
    ['a promise of a Buffer', () => Promise.resolve(KEY)],
    ['a promise of a Uint8Array, later', () => TICK().then(() => new Uint8Array(KEY))],
    [
      'a thenable that settles twice',
      () =>
        thenable((resolve, reject) => {
          resolve(KEY);
          resolve('');
          reject(1);
        }),
    ],
  ];
  test.for(answers)('may answer with %s', async ([, pskKey]) => {
    const asked: string[] = [];
    const from = await startKeys((user) => {
      asked.push(user);
      return pskKey(user);
    });
    await works(await from.connect(ALICE));
    expect(from.opens[0]?.peer.tls).toMatchObject({ protocol: 'TLSv1.3', pskUser: 'alice', certificateNames: [] });
    expect(from.errors).toEqual([]);
    expect(asked).toEqual(['alice']);
    expect(await reasonOf(from, from.connect({ psk: { user: 'alice', key: randomBytes(16) } }))).toMatch(
      /^the TLS handshake failed: /,
    );
    expect(from.errors).toEqual([]);
  });

  test('may answer later to nbdinfo, qemu-img and nbdcopy', async () => {
    const from = await startKeys((user) => TICK().then(() => (user === 'alice' ? KEY : undefined)));
    const directory = await temporaryDirectory();
    const keys = join(directory, 'keys.psk');
    await writeFile(keys, `alice:${KEY.toString('hex')}\n`);
    const run = promisify(execFile);
    const uri = `nbds://alice@127.0.0.1:${from.port}/disk?tls-psk-file=${keys}`;
    expect(Number((await run('nbdinfo', ['--size', uri])).stdout)).toBeGreaterThan(0);
    await run('nbdcopy', [uri, join(directory, 'copy')]);
    await run('qemu-img', [
      ...['info', '--object', `tls-creds-psk,id=t,endpoint=client,dir=${directory},username=alice`],
      ...['--image-opts', `driver=nbd,host=127.0.0.1,port=${from.port},export=disk,tls-creds=t`],
    ]);
    await until(() => from.closes.length >= 3, 'all connections are over');
    expect(from.closes.map(({ peer }) => peer.tls?.pskUser)).toEqual(from.closes.map(() => 'alice'));
    expect(from.errors).toEqual([]);
    await expect(run('nbdinfo', ['--size', uri.replace('alice@', 'bob@')])).rejects.toThrow();
  });

  test('is asked for users in TLS 1.3 only if the client has a key; a stranger may still show a certificate', async () => {
    const asked: string[] = [];
    const pskKey = (user: string): Promise<Buffer | null> => {
      asked.push(user);
      return Promise.resolve(user === 'alice' ? KEY : null);
    };
    const from = await start({ pskKey, authorities: authority.pair.chain, verifyPeer: true });
    await works(await from.connect({ authorities: authority.pair.chain, certificate: client }));
    expect(asked).toEqual([]);
    const raw = await rawInTls(from, {
      minVersion: 'TLSv1.3',
      ciphers: 'TLS_AES_128_GCM_SHA256',
      pskCallback: () => ({ psk: KEY, identity: 'bob' }),
      cert: client.chain,
      key: client.key,
      checkServerIdentity: () => undefined,
    });
    await raw.option(OPT.INFO, infoQuery('disk'));
    expect(asked).toEqual(['bob']);
    expect(from.provider.peers.at(-1)?.tls?.pskUser).toBeUndefined();
    expect(from.provider.peers.at(-1)?.tls?.certificate?.subject[0]?.value).toBe('Example');
    await works(await from.connect(ALICE));
    expect(asked).toEqual(['bob', 'alice']);
  });

  test('without a key, and without a certificate that is signed, a client is refused', async () => {
    const from = await start({ pskKey: () => KEY, authorities: authority.pair.chain, verifyPeer: true });
    for (const maxVersion of ['TLSv1.2', 'TLSv1.3'] as const) {
      // It shows what it has for itself: nothing.
      const raw = await rawInTls(from, { maxVersion }).catch(() => undefined);
      if (raw !== undefined) await expect(raw.option(OPT.INFO, infoQuery('disk'))).rejects.toBeDefined();
      await until(() => from.closes.length > 0, 'it is refused');
      expect(from.closes.shift()?.reason).toMatch(/the client's certificate: UNABLE_TO_GET_ISSUER_CERT$/);
    }
    expect(from.opens).toEqual([]);
    expect(from.provider.peers.filter(({ tls }) => tls !== undefined)).toEqual([]);
  });

  const wrong: readonly (readonly [string, () => unknown, RegExp])[] = [
    ['throws', thrower(new TypeError('no database')), /pskKey\("alice"\) threw TypeError: no database$/],
    ['throws what cannot be shown', thrower(unprintable), /pskKey\("alice"\) threw an object that cannot be shown$/],
    ['rejects', () => Promise.reject(new Error('no database')), /pskKey\("alice"\) rejected with Error: no database$/],
    ['rejects later, with nothing', () => TICK().then(thrower(null)), /pskKey\("alice"\) rejected with null$/],
    ['throws in then', () => ({ then: thrower('x') }), /pskKey\("alice"\) rejected with "x"$/],
    [
      'returns text',
      () => KEY.toString('hex'),
      /pskKey\("alice"\) returned a string of 32 characters; .*Buffer\.from\(text, 'hex'\)$/,
    ],
    ['resolves to text', () => Promise.resolve('secret'), /pskKey\("alice"\) returned a string of 6 characters; /],
    ['returns a number', () => 7, /pskKey\("alice"\) returned a number; expected was a Buffer or Uint8Array$/],
    ['resolves to an object', () => Promise.resolve({ psk: KEY }), /pskKey\("alice"\) returned an object; /],
    ['returns false', () => false, /pskKey\("alice"\) returned a boolean; /],
    [
      'returns an empty key',
      () => Buffer.alloc(0),
      /pskKey\("alice"\) returned a key of 0 bytes; expected was one of 1 /,
    ],
    [
      'resolves to an empty key',
      () => Promise.resolve(new Uint8Array()),
      /pskKey\("alice"\) returned a key of 0 bytes; /,
    ],
    ['returns too long a key', () => Buffer.alloc(513), /pskKey\("alice"\) returned a key of 513 bytes; /],
  ];
  test.for(wrong)('that %s ends one connection, in TLS 1.3', async ([, pskKey, reason]) => {
    let answer = (): unknown => KEY;
    const from = await startKeys(() => answer());
    const other = await from.connect(ALICE);
    await other.go('disk');
    answer = pskKey;
    expect(await reasonOf(from, from.connect(ALICE))).toMatch(reason);
    expect(from.errors.map((error) => (error as Error).message)).toEqual([expect.stringMatching(reason)]);
    answer = () => KEY;
    await works(await from.connect(ALICE));
    expect(await other.read(4, 4)).toEqual(uint32(5));
  });

  const tls12: tls.ConnectionOptions = {
    maxVersion: 'TLSv1.2',
    ciphers: 'ECDHE-PSK-CHACHA20-POLY1305',
    pskCallback: () => ({ psk: KEY, identity: 'alice' }),
    checkServerIdentity: () => undefined,
  };

  test.for(wrong.filter(([, pskKey]) => !isPromised(pskKey)))(
    'that %s ends one connection, in TLS 1.2',
    async ([, pskKey, reason]) => {
      const from = await startKeys(pskKey);
      await expect(rawInTls(from, tls12)).rejects.toThrow();
      await until(() => from.closes.length === 1, 'the connection is over');
      expect(from.closes[0]?.reason).toMatch(reason);
      expect(from.errors).toHaveLength(1);
    },
  );

  test('that answers later cannot serve TLS 1.2, and the reason says so; certificates can', async () => {
    for (const pskKey of [() => Promise.resolve(KEY), () => Promise.reject(new Error('later')), never]) {
      const from = await start({ pskKey });
      await expect(rawInTls(from, tls12)).rejects.toThrow();
      await until(() => from.closes.length === 1, 'the connection is over');
      expect(from.closes[0]?.reason).toBe(
        'the TLS handshake failed: pskKey("alice") returned a promise, which can be waited for only in TLS 1.3, and for the ' +
          'first 4 users that a client names; to serve this client, return the key itself',
      );
      // A stranger can cause it: it is no error of the program.
      expect(from.errors).toEqual([]);
      const raw = await rawInTls(from, { maxVersion: 'TLSv1.2' });
      await raw.option(OPT.INFO, infoQuery('disk'));
      expect(from.provider.peers[0]?.tls?.protocol).toBe('TLSv1.2');
    }
  });

  test('that never settles ends the connection after openTimeoutMs, and the reason names it', async () => {
    const from = await startKeys(never, { openTimeoutMs: 100 });
    expect(await reasonOf(from, from.connect(ALICE))).toBe(
      'the server has not got an answer of pskKey("alice") within 100 ms',
    );
    expect(from.server.connections.size).toBe(0);
  });

  for (const leave of ['halfClose', 'vanish'] as const) {
    test(`that is waited for when the client leaves (${leave}) is forgotten, and may settle later`, async () => {
      for (const settle of [
        (gate: Gate) => gate.opened.then(() => KEY),
        (gate: Gate) => gate.opened.then(thrower('x')),
      ]) {
        const gate = new Gate();
        let asked = 0;
        const from = await startKeys(() => {
          asked += 1;
          return settle(gate);
        });
        const raw = await acknowledged(from);
        raw.send(clientHello({ identities: ['alice'] }));
        await until(() => asked === 1, 'the key is asked for');
        raw[leave]();
        await until(() => from.closes.length === 1, 'the connection is over');
        expect(from.closes[0]?.reason).toBe('the TLS handshake failed: the client left');
        expect(from.server.connections.size).toBe(0);
        gate.open();
        await TICK();
        expect(from.errors).toEqual([]);
      }
    });
  }

  test('that is waited for does not hold up close()', async () => {
    const from = await startKeys(never);
    const connecting = failure(from.connect(ALICE));
    await until(() => from.server.connections.size === 1, 'it is connected');
    const begun = performance.now();
    await from.server.close({ graceMs: 20_000 });
    expect(performance.now() - begun).toBeLessThan(10_000);
    expect(from.closes[0]?.reason).toBe('the server is shutting down');
    await connecting;
  });

  test('is asked for four users at most in advance, and stops at the first that it knows', async () => {
    const asked: string[] = [];
    const from = await startKeys((user) => {
      asked.push(user);
      return Promise.resolve(user === 'known' ? KEY : undefined);
    });
    const users = Array.from({ length: 200 }, (_, i) => `user${i}`);
    const send = async (...identities: readonly string[]): Promise<void> => {
      const before = from.closes.length;
      const raw = await acknowledged(from);
      raw.send(clientHello({ identities }));
      await raw.readToEnd();
      await until(() => from.closes.length > before, 'the connection is over');
    };
    await send(...users);
    // OpenSSL has asked for the fifth, if it got so far.
    expect([4, 5]).toContain(asked.length);
    expect(users.slice(0, 5)).toEqual(expect.arrayContaining(asked));
    asked.length = 0;
    await send('user0', 'known', 'user1');
    expect(asked).toEqual(['user0', 'known']);
    asked.length = 0;
    // As OpenSSL and Node would ask: up to the first zero, and nothing that is not UTF-8 or too long.
    await send('zero\0rest', 'x'.repeat(257), 'known');
    expect(asked).toEqual(['zero', 'known']);
  });

  test('may use its memory again as soon as it has answered', async () => {
    const shared = Buffer.alloc(16);
    const from = await startKeys(() => {
      KEY.copy(shared);
      const answer = Promise.resolve(shared);
      void answer.then(() => setImmediate(() => shared.fill(0)));
      return answer;
    });
    await works(await from.connect(ALICE));
  });

  test('is asked once when the server wants another group (HelloRetryRequest)', async () => {
    const usual = tls.DEFAULT_ECDH_CURVE;
    onTestFinished(() => void (tls.DEFAULT_ECDH_CURVE = usual));
    tls.DEFAULT_ECDH_CURVE = 'P-384';
    let asked = 0;
    const from = await startKeys(() => {
      asked += 1;
      return TICK().then(() => KEY);
    });
    const raw = await rawInTls(from, {
      ecdhCurve: 'X25519:P-384',
      ciphers: 'TLS_AES_128_GCM_SHA256',
      pskCallback: () => ({ psk: KEY, identity: 'alice' }),
      checkServerIdentity: () => undefined,
    });
    await raw.option(OPT.INFO, infoQuery('disk'));
    expect(from.provider.peers[0]?.tls?.pskUser).toBe('alice');
    expect(asked).toBe(1);
  });

  test('is asked also when the ClientHello comes byte by byte', async () => {
    const from = await startKeys(() => TICK().then(() => KEY));
    const plain = await acknowledged(from);
    const { socket } = plain;
    socket.removeAllListeners('data').removeAllListeners('end');
    const { client: near, server: far } = connectedEnds();
    onTestFinished(() => void near.destroy());
    let sending = Promise.resolve();
    far.on('data', (bytes: Buffer) => {
      for (const byte of bytes) {
        sending = sending.then(() => new Promise((resolve) => socket.write(Buffer.from([byte]), () => resolve())));
      }
    });
    socket.on('data', (bytes: Buffer) => far.write(bytes));
    const secure = tls.connect({
      socket: near,
      ciphers: 'TLS_AES_128_GCM_SHA256',
      pskCallback: () => ({ psk: KEY, identity: 'alice' }),
      checkServerIdentity: () => undefined,
    });
    const inTls = new RawClient(secure);
    await inTls.option(OPT.INFO, infoQuery('disk'));
    expect(from.provider.peers[0]?.tls?.pskUser).toBe('alice');
  });
});

describe('a client', () => {
  test('may give its key as any bytes', async () => {
    const from = await startKeys(() => KEY);
    await works(await from.connect({ psk: { user: 'alice', key: new Uint8Array(KEY) } }));
  });

  test.for([
    ['alice', KEY.toString('hex'), /psk\.key is a string of 32 characters; /],
    ['alice', undefined, /psk\.key is undefined; /],
    ['alice', Buffer.alloc(0), /psk\.key is 0 bytes; /],
    ['alice', Buffer.alloc(513), /psk\.key is 513 bytes; /],
    ['', KEY, /psk\.user is an empty string; /],
    [7, KEY, /psk\.user is a number; /],
    ['alice\0', KEY, /psk\.user is a string of 6 characters; /],
    ['x'.repeat(257), KEY, /psk\.user is a string of 257 characters; /],
  ] as const)('with user %j and key %j is refused by itself', async ([user, key, reason]) => {
    const from = await startKeys(() => KEY);
    const psk = { user, key } as { user: string; key: Buffer };
    const refused = await from.connect({ psk }).catch((error: unknown) => error);
    expect(refused).toBeInstanceOf(TypeError);
    expect((refused as TypeError).message).toMatch(reason);
    // It is not even connected.
    expect(from.opens).toEqual([]);
  });
});

/** Whether a wrong pskKey answers with a promise: in TLS 1.2 that alone is refused. */
function isPromised(pskKey: () => unknown): boolean {
  try {
    const answer = pskKey() as { then?: unknown };
    if (answer instanceof Promise) answer.catch(() => undefined);
    return typeof answer.then === 'function';
  } catch {
    return false;
  }
}
