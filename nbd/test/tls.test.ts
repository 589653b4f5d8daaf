/** TLS: which clients are accepted, and that options negotiated in the clear do not count under TLS. */

import { randomBytes } from 'node:crypto';
import net from 'node:net';
import { join } from 'node:path';
import tls from 'node:tls';
import { beforeAll, describe, expect, onTestFinished, test } from 'vitest';
import { NbdClient, NbdServer, type Limits, type TlsMaterial, type TlsMode } from '../src/index.js';
import { certificateNames } from '../src/protocol/tls-identity.js';
import { CMD, GREETING_SIZE, NBD_ERRNO, OPT, REP } from '../src/protocol/wire.js';
import { Authority, type Pair } from './pki.js';
import { infoQuery, metaQueries, optionBytes, optionHeader, RawClient, requestBytes, uint32 } from './raw-client.js';
import { DISK_SIZE, Gate, TestProvider } from './test-device.js';
import { temporaryDirectory, until } from './test-server.js';
import { failure, rawInTls, starttls, startTlsServer, type TlsServer } from './tls-server.js';

const UNKNOWN_OPTION = 0x4e;
const KEY = Buffer.from('00112233445566778899aabbccddeeff', 'hex');
const pskKey = (user: string): Buffer | undefined => (user === 'alice' ? KEY : undefined);

let authority: Pair;
let otherAuthority: Pair;
let server: Pair;
let client: Pair;
let stranger: Pair;

beforeAll(async () => {
  const [own, other] = await Promise.all([Authority.make('authority'), Authority.make('other')]);
  authority = own.pair;
  otherAuthority = other.pair;
  server = await own.sign(['CN = disks'], ['DNS.1 = disks.example', 'IP.1 = 127.0.0.1']);
  client = await own.sign(['CN = backup'], ['DNS.1 = backup.example']);
  stranger = await other.sign(['CN = backup'], ['DNS.1 = backup.example']);
});

/** With the server's certificate, unless `material` says otherwise. */
function start(mode: TlsMode, material: Partial<TlsMaterial> = {}, limits: Partial<Limits> = {}): Promise<TlsServer> {
  const initial = { certificate: server, verifyPeer: false, ...material };
  return startTlsServer({ mode, material: initial, authority: authority.chain, limits });
}

describe('certificates', () => {
  test('requests up to the largest work under TLS, and the peer has the identity of its certificate', async () => {
    const from = await start('require');
    const connected = await from.connect();
    await connected.go('disk');
    const data = randomBytes(DISK_SIZE);
    await connected.write(0, data);
    expect((await connected.read(0, DISK_SIZE)).equals(data)).toBe(true);
    await Promise.all(Array.from({ length: 200 }, (_, i) => connected.read(i * 4096, 4096)));
    await connected.disconnect();
    await until(() => from.closes.length === 1, 'the connection is over');
    expect(from.closes[0]).toMatchObject({
      reason: 'the client disconnected',
      bytesWritten: DISK_SIZE,
      peer: { transport: 'tcp', host: '127.0.0.1', tls: { protocol: 'TLSv1.3', certificateNames: [] } },
    });
    expect(from.provider.openNow).toBe(0);
  });

  test('a client that stops reading is throttled, and served when it reads again, as without TLS', async () => {
    const from = await start('require', {}, { maxUnsentBytes: 64 * 1024 });
    const raw = await rawInTls(from);
    await raw.option(OPT.GO, infoQuery('disk'));
    raw.socket.pause();
    const count = 400;
    for (let i = 0; i < count; i++) raw.request({ type: CMD.READ, offset: 4096, length: 65536, cookie: BigInt(i) });
    await until(() => from.provider.calls.length > 0, 'reads are made');
    expect(from.provider.calls.length).toBeLessThan(count);
    raw.socket.resume();
    for (let i = 0; i < count; i++) expect((await raw.readReply(65536)).data.readUInt32BE(0)).toBe(4097);
  });

  test('a client certificate is verified, and its names are the identity of the peer in all calls of the provider', async () => {
    const from = await start('require', { verifyPeer: true, authorities: authority.chain });
    const connected = await from.connect({ authorities: authority.chain, certificate: client });
    await connected.info('disk');
    expect(from.provider.peers[0]?.tls?.certificateNames).toEqual(['backup', 'backup.example']);
    await connected.go('disk');
    await connected.read(0, 512);
  });

  for (const [what, certificate, reason] of [
    ['no certificate', (): undefined => undefined, /^the TLS handshake failed: peer did not return a certificate$/],
    [
      'a certificate of another authority',
      (): Pair => stranger,
      /^the TLS handshake failed: the client's certificate: UNABLE_TO_/,
    ],
  ] as const) {
    test(`a client with ${what} is refused, and the reason is reported`, async () => {
      const from = await start('require', { verifyPeer: true, authorities: authority.chain });
      // In TLS 1.3 a client learns of its refusal only after the handshake.
      const error = await failure(
        from
          .connect({ authorities: authority.chain, certificate: certificate() })
          .then((connected) => connected.list()),
      );
      expect(['TLS_FAILED', 'CLOSED']).toContain(error.code);
      await until(() => from.closes.length === 1, 'the connection is over');
      expect(from.closes[0]?.reason).toMatch(reason);
      expect(from.opens).toEqual([]);
    });
  }

  test('new TLS settings apply to new connections, and open connections continue', async () => {
    const from = await start('require');
    const before = await from.connect();
    await before.go('disk');
    from.material = { certificate: stranger, verifyPeer: false };
    expect((await failure(from.connect())).code).toBe('TLS_FAILED');
    await from.connect({ authorities: otherAuthority.chain, serverName: 'backup.example' });
    await before.read(0, 512);
  });

  test('certificate names with a comma or quotes are ignored', () => {
    const certificate = (subjectaltname: string, CN: unknown = 'one'): tls.PeerCertificate =>
      ({ subject: { CN }, subjectaltname }) as unknown as tls.PeerCertificate;
    expect(certificateNames(certificate('DNS:a, IP Address:1.2.3.4, DNS:b'))).toEqual(['one', 'a', 'b']);
    expect(certificateNames(certificate('DNS:"a, DNS:b", DNS:c'))).toEqual(['one']);
    expect(certificateNames(certificate('', ['x', 'y']))).toEqual(['x', 'y']);
    expect(certificateNames({})).toEqual([]);
  });
});

describe('pre-shared keys', () => {
  for (const certificate of [false, true]) {
    test(`the right key is accepted ${certificate ? 'beside certificates' : 'without certificates'}`, async () => {
      const from = await start('require', { pskKey, ...(!certificate && { certificate: undefined }) });
      const connected = await from.connect({ psk: { user: 'alice', key: KEY } });
      await connected.info('disk');
      expect(from.provider.peers[0]?.tls).toMatchObject({ pskUser: 'alice', certificateNames: [] });
      await connected.go('disk');
      expect(await connected.read(4, 4)).toEqual(uint32(5));
    });
  }

  test('a wrong key and an unknown user are refused', async () => {
    const from = await start('require', { pskKey, certificate: undefined });
    for (const psk of [
      { user: 'alice', key: randomBytes(16) },
      { user: 'bob', key: KEY },
    ]) {
      expect((await failure(from.connect({ psk }))).code).toBe('TLS_FAILED');
    }
    await until(() => from.closes.length === 2, 'both connections are over');
    await from.connect({ psk: { user: 'alice', key: KEY } });
  });

  test('TLS 1.2 clients are accepted with a key, and have its identity', async () => {
    const from = await start('require', { pskKey });
    const raw = await rawInTls(from, {
      maxVersion: 'TLSv1.2',
      ciphers: 'ECDHE-PSK-CHACHA20-POLY1305',
      pskCallback: () => ({ psk: KEY, identity: 'alice' }),
      checkServerIdentity: () => undefined,
    });
    await raw.option(OPT.INFO, infoQuery('disk'));
    expect(from.provider.peers[0]?.tls).toMatchObject({ protocol: 'TLSv1.2', pskUser: 'alice' });
  });

  test('naming a user without using its key, with a cipher that does not fit the key, gives no identity', async () => {
    const from = await start('require', { pskKey });
    const raw = await rawInTls(from, {
      minVersion: 'TLSv1.3',
      ciphers: 'TLS_AES_256_GCM_SHA384',
      pskCallback: () => ({ psk: randomBytes(16), identity: 'alice' }),
      checkServerIdentity: () => undefined,
    });
    await raw.option(OPT.INFO, infoQuery('disk'));
    expect(from.provider.peers[0]?.tls).toBeDefined();
    expect(from.provider.peers[0]?.tls?.pskUser).toBeUndefined();
  });

  test('a client that expects a key does not accept a certificate instead', async () => {
    const from = await start('require', { certificate: server });
    expect((await failure(from.connect({ psk: { user: 'alice', key: KEY } }))).code).toBe('TLS_FAILED');
  });
});

describe('mode require', () => {
  test('before TLS refuses everything but STARTTLS and ABORT with TLS_REQD, and sends nothing about exports', async () => {
    const from = await start('require');
    const raw = await from.raw();
    await raw.greet();
    const asked: readonly (readonly [number, Buffer?])[] = [
      [OPT.LIST],
      [OPT.INFO, infoQuery('disk')],
      [OPT.GO, infoQuery('disk')],
      [OPT.STRUCTURED_REPLY],
      [OPT.EXTENDED_HEADERS],
      [OPT.LIST_META_CONTEXT, Buffer.alloc(12)],
      [OPT.SET_META_CONTEXT, Buffer.alloc(12)],
      [OPT.PEEK_EXPORT],
      [UNKNOWN_OPTION, Buffer.alloc(100_000)],
    ];
    for (const [option, data] of asked) {
      const replies = await raw.option(option, data);
      expect(replies.map((reply) => [reply.option, reply.type])).toEqual([[option, REP.ERR_TLS_REQD]]);
    }
    expect(from.provider.peers).toEqual([]);
    expect((await raw.option(OPT.ABORT)).map(({ type }) => type)).toEqual([REP.ACK]);
    await raw.readToEnd();
  });

  test('closes the connection after EXPORT_NAME, which has no error reply', async () => {
    const from = await start('require');
    const raw = await from.raw();
    await raw.greet();
    raw.send(optionBytes(OPT.EXPORT_NAME, Buffer.from('disk')));
    expect(await raw.readToEnd()).toHaveLength(0);
    await until(() => from.closes.length === 1, 'the connection is over');
    expect(from.closes[0]?.reason).toBe('an export was asked for without TLS');
    expect(from.provider.opened).toBe(0);
  });

  test('sends a client without fixed newstyle nothing in the clear, and lets it begin TLS', async () => {
    const from = await start('require');
    const raw = await from.raw();
    await raw.greet(0);
    for (const option of [OPT.LIST, OPT.GO]) {
      const replies = await raw.option(option, option === OPT.GO ? infoQuery('disk') : undefined);
      expect(replies.map(({ type }) => type)).toEqual([REP.ERR_TLS_REQD]);
    }
    expect((await raw.option(OPT.STARTTLS)).map(({ type }) => type)).toEqual([REP.ACK]);
    const other = await from.raw();
    await other.greet(0);
    other.send(optionBytes(OPT.EXPORT_NAME, Buffer.from('disk')));
    expect(await other.readToEnd()).toHaveLength(0);
    expect(from.provider.opened).toBe(0);
  });

  test('does not apply to internal peers, whose streams come from the embedding program', async () => {
    const from = await start('require');
    const { duplexPair } = await import('./duplex-pair.js');
    const pair = duplexPair();
    from.server.serveConnection(pair.server);
    await new RawClient(pair.client).open('disk');
  });
});

describe('modes on and off', () => {
  test('on: clients choose, and an export for TLS only says so to clients in the clear', async () => {
    const from = await start('on');
    const raw = await from.raw();
    await raw.greet();
    expect((await raw.option(OPT.INFO, infoQuery('disk'))).at(-1)?.type).toBe(REP.ACK);
    expect((await raw.option(OPT.INFO, infoQuery('tls only'))).at(-1)?.type).toBe(REP.ERR_TLS_REQD);
    await (await from.connect()).info('tls only');
  });

  test('off: STARTTLS is answered POLICY; a server without TLS settings answers UNSUP', async () => {
    const raw = await (await start('off')).raw();
    await raw.greet();
    expect((await raw.option(OPT.STARTTLS))[0]?.type).toBe(REP.ERR_POLICY);
    expect((await raw.option(OPT.GO, infoQuery('disk'))).at(-1)?.type).toBe(REP.ACK);

    const bare = new NbdServer({ provider: new TestProvider([]) });
    onTestFinished(() => bare.destroy());
    const path = join(await temporaryDirectory(), 'nbd.sock');
    await bare.listen({ path });
    const other = await RawClient.connect({ path });
    await other.greet();
    expect((await other.option(OPT.STARTTLS))[0]?.type).toBe(REP.ERR_UNSUP);
  });

  test('STARTTLS with data is invalid, and the handshake continues', async () => {
    const raw = await (await start('on')).raw();
    await raw.greet();
    expect((await raw.option(OPT.STARTTLS, Buffer.alloc(1)))[0]?.type).toBe(REP.ERR_INVALID);
    expect((await raw.option(OPT.LIST)).at(-1)?.type).toBe(REP.ACK);
  });
});

describe('injection and downgrade', () => {
  const injected = [
    ['a whole option', optionBytes(OPT.GO, infoQuery('disk'))],
    ['part of an option header', optionHeader(OPT.LIST, 0).subarray(0, 7)],
    ['one byte', Buffer.alloc(1)],
  ] as const;
  for (const [what, bytes] of injected) {
    test(`${what} in the same packet as STARTTLS closes the connection`, async () => {
      const from = await start('on');
      const raw = await from.raw();
      await raw.greet();
      raw.send(optionBytes(OPT.STARTTLS), bytes);
      expect(await raw.readToEnd()).toHaveLength(0);
      await until(() => from.closes.length === 1, 'the connection is over');
      expect(from.closes[0]?.reason).toContain('bytes in the clear after NBD_OPT_STARTTLS');
      expect(from.provider.opened).toBe(0);
    });

    test(`${what} between STARTTLS and the TLS handshake is parsed as TLS, and fails`, async () => {
      const from = await start('on');
      const raw = await from.raw();
      await raw.greet();
      expect((await raw.option(OPT.STARTTLS))[0]?.type).toBe(REP.ACK);
      raw.send(bytes);
      raw.halfClose();
      await raw.readToEnd();
      await until(() => from.closes.length === 1, 'the connection is over');
      expect(from.closes[0]?.reason).toMatch(/^the TLS handshake failed/);
      expect(from.provider.opened).toBe(0);
      expect(from.provider.peers).toEqual([]);
    });
  }

  test('options negotiated in the clear are discarded: replies are simple and no context is selected', async () => {
    const from = await start('on');
    const plain = await from.raw();
    await plain.greet();
    expect((await plain.option(OPT.STRUCTURED_REPLY))[0]?.type).toBe(REP.ACK);
    const selected = await plain.option(OPT.SET_META_CONTEXT, metaQueries('disk', ['base:allocation']));
    expect(selected.map(({ type }) => type)).toEqual([REP.META_CONTEXT, REP.ACK]);
    expect((await plain.option(OPT.EXTENDED_HEADERS))[0]?.type).toBe(REP.ACK);
    const inTls = await starttls(plain);
    // Meta contexts need structured replies, which were not negotiated under TLS.
    expect((await inTls.option(OPT.SET_META_CONTEXT, metaQueries('disk', ['base:allocation'])))[0]?.type).toBe(
      REP.ERR_INVALID,
    );
    await inTls.option(OPT.GO, infoQuery('disk'));
    inTls.request({ type: CMD.BLOCK_STATUS, length: 4096, cookie: 1n });
    expect(await inTls.readReply()).toMatchObject({ errno: NBD_ERRNO.EINVAL, cookie: 1n });
    inTls.request({ type: CMD.READ, offset: 4, length: 4, cookie: 2n });
    expect(await inTls.readReply(4)).toEqual({ errno: 0, cookie: 2n, data: uint32(5) });
  });

  test('a second STARTTLS is invalid, and the connection stays in TLS', async () => {
    const raw = await rawInTls(await start('on'));
    expect((await raw.option(OPT.STARTTLS))[0]?.type).toBe(REP.ERR_INVALID);
    expect((await raw.option(OPT.GO, infoQuery('disk'))).at(-1)?.type).toBe(REP.ACK);
    raw.send(requestBytes({ type: CMD.READ, offset: 4, length: 4 }));
    expect((await raw.readReply(4)).data).toEqual(uint32(5));
  });

  test('TLS 1.1 is refused', async () => {
    const from = await start('require');
    await expect(rawInTls(from, { minVersion: 'TLSv1', maxVersion: 'TLSv1.1' })).rejects.toThrow();
    await until(() => from.closes.length === 1, 'the connection is over');
  });

  test('the close reason of a client that begins with TLS from the first byte says so', async () => {
    const from = await start('require');
    const error = await new Promise<Error>((resolve) => {
      const secure = tls.connect({ port: from.port, host: '127.0.0.1', rejectUnauthorized: false });
      secure.once('error', resolve);
    });
    expect(error).toBeInstanceOf(Error);
    await until(() => from.closes.length === 1, 'the connection is over');
    expect(from.closes[0]?.reason).toContain('in NBD it begins with NBD_OPT_STARTTLS');
    await (await from.connect()).list();
  });

  test('a client that never begins the TLS handshake is closed after its time limit', async () => {
    const from = await start('require', {}, { handshakeTimeoutMs: 100 });
    const raw = await from.raw();
    await raw.greet();
    await raw.option(OPT.STARTTLS);
    await raw.readToEnd();
    await until(() => from.closes.length === 1, 'the connection is over');
    expect(from.closes[0]?.reason).toBe('no export chosen within 100 ms');
  });

  test('a client that leaves during the TLS handshake ends only its connection', async () => {
    const from = await start('require');
    for (const leave of ['halfClose', 'vanish'] as const) {
      const raw = await from.raw();
      await raw.greet();
      await raw.option(OPT.STARTTLS);
      raw[leave]();
    }
    await until(() => from.closes.length === 2, 'both connections are over');
    expect(from.server.connections.size).toBe(0);
  });

  test('broken TLS records after the handshake end that connection only', async () => {
    const from = await start('require');
    const other = await from.connect();
    await other.go('disk');
    const plain = await from.raw();
    await plain.greet();
    await plain.option(OPT.STARTTLS);
    const { socket } = plain;
    if (!(socket instanceof net.Socket)) throw new Error('not a socket of the system');
    socket.removeAllListeners('data').removeAllListeners('end');
    const inTls = new RawClient(tls.connect({ socket, rejectUnauthorized: false }));
    await inTls.option(OPT.LIST);
    socket.write(Buffer.concat([Buffer.from([23, 3, 3, 0, 32]), Buffer.alloc(32)]));
    await until(() => from.closes.length === 1, 'the connection is over');
    expect(from.closes[0]?.reason).toContain('socket error');
    await other.read(0, 512);
  });
});

describe('the client', () => {
  /** A server that sends a greeting, and answers the first option with `answer`. */
  async function fake(flags: number, answer: Buffer): Promise<{ readonly port: number; received(): Buffer }> {
    let received = Buffer.alloc(0);
    const listener = net.createServer((socket) => {
      onTestFinished(() => void socket.destroy());
      socket.on('error', () => undefined);
      socket.write(Buffer.concat([Buffer.from('NBDMAGICIHAVEOPT'), Buffer.from([0, flags])]));
      let isAnswered = false;
      socket.on('data', (chunk: Buffer) => {
        received = Buffer.concat([received, chunk]);
        if (received.length < 20 || isAnswered) return;
        isAnswered = true;
        socket.write(answer);
      });
    });
    onTestFinished(() => void listener.close());
    await new Promise<void>((resolve) => listener.listen(0, '127.0.0.1', resolve));
    return { port: (listener.address() as net.AddressInfo).port, received: () => received };
  }

  const reply = (type: number): Buffer =>
    Buffer.concat([Buffer.from('0003e889045565a9', 'hex'), uint32(OPT.STARTTLS), uint32(type), uint32(0)]);

  for (const [what, answer] of [
    ['does not know STARTTLS', reply(REP.ERR_UNSUP)],
    ['refuses STARTTLS', reply(REP.ERR_POLICY)],
    ['continues in the clear after its acknowledgement', Buffer.concat([reply(REP.ACK), reply(REP.ACK)])],
    ['does not speak TLS after its acknowledgement', Buffer.concat([reply(REP.ACK)])],
  ] as const) {
    test(`fails with a server that ${what}, and sends nothing more`, async () => {
      const { port, received } = await fake(3, answer);
      const attempt = NbdClient.connect({ host: '127.0.0.1', port, tls: { authorities: authority.chain } });
      if (what === 'does not speak TLS after its acknowledgement') {
        const hello = until(() => received().length > 20, 'the client says hello in TLS');
        await hello;
        expect(received().readUInt16BE(20)).toBe(0x1603);
        return void attempt.catch(() => undefined);
      }
      expect((await failure(attempt)).code).toBe('TLS_FAILED');
      expect(received()).toEqual(Buffer.concat([uint32(3), optionBytes(OPT.STARTTLS)]));
    });
  }

  test('refuses a server without fixed newstyle, which TLS needs', async () => {
    const { port } = await fake(0, Buffer.alloc(0));
    const error = await failure(NbdClient.connect({ host: '127.0.0.1', port, tls: { authorities: authority.chain } }));
    expect(error.code).toBe('PROTOCOL');
  });

  test('refuses a certificate of another authority or for another name', async () => {
    const from = await start('require');
    for (const options of [
      { authorities: otherAuthority.chain },
      {},
      { authorities: authority.chain, serverName: 'other.example' },
    ]) {
      const error = await failure(from.connect(options));
      expect(error.code).toBe('TLS_FAILED');
      expect(error.message).toMatch(/^TLS is required, but the server did not complete it: /);
    }
    await from.connect({ authorities: authority.chain, serverName: 'disks.example' });
    await until(() => from.closes.length === 3, 'the refused connections are over');
  });

  test('gets TLS_REQUIRED from a server that requires TLS', async () => {
    const from = await start('require');
    const plain = await NbdClient.connect({ host: '127.0.0.1', port: from.port });
    onTestFinished(() => plain.destroy());
    expect((await failure(plain.go('disk'))).code).toBe('TLS_REQUIRED');
  });

  test('and the server speak TLS over any stream, not only over sockets', async () => {
    const from = await start('require');
    const { duplexPair } = await import('./duplex-pair.js');
    const pair = duplexPair();
    from.server.serveConnection(pair.server, { peer: { transport: 'tcp', address: '192.0.2.1:7', host: '192.0.2.1' } });
    const connected = await NbdClient.connect({
      socket: pair.client,
      tls: { authorities: authority.chain, serverName: 'disks.example' },
    });
    onTestFinished(() => connected.destroy());
    await connected.go('disk');
    const data = randomBytes(300_000);
    await connected.write(4096, data);
    expect((await connected.read(4096, data.length)).equals(data)).toBe(true);
    await connected.disconnect();
    await until(() => from.closes.length === 1, 'the connection is over');
    expect(from.closes[0]).toMatchObject({ reason: 'the client disconnected', peer: { host: '192.0.2.1' } });
  });

  test('a client that has closed its sending side is answered over TLS as well', async () => {
    const from = await start('require');
    const gate = new Gate();
    from.provider.hook = () => gate.opened;
    const raw = await rawInTls(from);
    await raw.option(OPT.GO, infoQuery('disk'));
    raw.request({ type: CMD.READ, offset: 4, length: 4 });
    raw.halfClose();
    await until(() => from.provider.unfinished === 1, 'the read is in flight');
    gate.open();
    expect((await raw.readReply(4)).data).toEqual(uint32(5));
    await raw.readToEnd();
    await until(() => from.closes.length === 1, 'the connection is over');
    expect(from.closes[0]?.reason).toBe('the client left without a disconnect request');
  });

  test('close() does not wait for a client that hangs in the TLS handshake', async () => {
    const from = await start('require');
    const raw = await from.raw();
    await raw.greet();
    await raw.option(OPT.STARTTLS);
    const begun = performance.now();
    await from.server.close({ graceMs: 20_000 });
    expect(performance.now() - begun).toBeLessThan(10_000);
    expect(from.closes[0]?.reason).toBe('the server is shutting down');
  });

  test('close() finishes requests in flight over TLS', async () => {
    const from = await start('require');
    const connected = await from.connect();
    await connected.go('disk');
    const reads = Array.from({ length: 50 }, (_, i) => connected.read(i * 4096, 4096));
    await Promise.all(reads);
    await from.server.close();
    expect((await failure(connected.read(0, 4))).code).toBe('CLOSED');
    expect(from.closes[0]?.reason).toBe('the server is shutting down');
    expect(from.provider.openNow).toBe(0);
  });
});

test('the greeting is sent before TLS, so that clients recognize an NBD server', async () => {
  const raw = await (await start('require')).raw();
  expect((await raw.read(GREETING_SIZE)).toString('latin1', 0, 16)).toBe('NBDMAGICIHAVEOPT');
});
