/**
 * Real clients over TLS: the tools of libnbd, qemu and nbdkit, with certificates and with pre-shared keys, accepted and
 * refused. These tests show that GnuTLS and OpenSSL interoperate, which our own client cannot show.
 */
import { createHash, randomBytes } from 'node:crypto';
import fs from 'node:fs';
import path from 'node:path';
import { beforeAll, describe, expect } from 'vitest';
import { Authority } from '../harness/certificates.js';
import { hasOwnClients } from '../harness/client-set.js';
import {
  BIN,
  cli,
  haveCommand,
  needs,
  ok,
  run,
  startDaemon,
  temporaryDirectory,
  waitUntil,
  type Daemon,
  type RunResult,
} from '../harness/daemon.js';

const MIB = 2 ** 20;
const KEY = '00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff';

/** Certificates are made with openssl. */
const needsKeys = (...commands: string[]): ReturnType<typeof needs> => needs('openssl', ...commands);

function refused(result: RunResult): string {
  expect(result.code, result.stdout).not.toBe(0);
  return result.stderr;
}

function sha256(file: string): string {
  return createHash('sha256').update(fs.readFileSync(file)).digest('hex');
}

/** The port of the daemon's TCP listener. */
function portOf(daemon: Daemon): string {
  const port = /^tcp:127\.0\.0\.1:(\d+)$/.exec(daemon.ready.listeners[1] ?? '')?.[1];
  if (port === undefined) throw new Error(`no TCP listener in ${daemon.ready.listeners.join(' ')}`);
  return port;
}

const tcp = ['--listen', 'tcp:127.0.0.1:0', '--create', 'disk:16M'];

let pki: string;
let server: string;
/** Certificate directories of clients: signed by our authority, by another one, and with our authority's certificate only. */
let client: string;
let stranger: string;
let anonymous: string;
let keys: string;

beforeAll(async () => {
  if (!haveCommand('openssl')) return;
  pki = temporaryDirectory();
  server = path.join(pki, 'server');
  client = path.join(pki, 'client');
  stranger = path.join(pki, 'stranger');
  anonymous = path.join(pki, 'anonymous');
  const ours = await Authority.make(path.join(pki, 'ca'));
  const other = await Authority.make(path.join(pki, 'other-ca'), 'another authority');
  await ours.sign('server', 'localhost', server, 'DNS:localhost,IP:127.0.0.1');
  await ours.sign('client', 'backup-host', client);
  await other.sign('client', 'backup-host', stranger);
  fs.copyFileSync(ours.cert, path.join(stranger, 'ca-cert.pem'));
  fs.mkdirSync(anonymous);
  fs.copyFileSync(ours.cert, path.join(anonymous, 'ca-cert.pem'));
  keys = path.join(pki, 'keys.psk');
  fs.writeFileSync(keys, `alice:${KEY}\n`, { mode: 0o600 });
});

/** An nbds:// URI over TCP for libnbd. */
function nbds(daemon: Daemon, certificates: string, name = 'disk'): string {
  return `nbds://localhost:${portOf(daemon)}/${name}?tls-certificates=${certificates}&tls-verify-peer=true`;
}

function pskUri(daemon: Daemon, user = 'alice', file = keys): string {
  return `nbds+unix://${user}@/disk?socket=${daemon.socket}&tls-psk-file=${file}`;
}

function randomFile(size: number): string {
  const file = path.join(temporaryDirectory(), 'in.img');
  fs.writeFileSync(file, randomBytes(size));
  return file;
}

describe('certificates', () => {
  needsKeys('nbdcopy', 'nbdinfo')(
    'nbdinfo and nbdcopy speak nbds:// with us, and nothing comes in the clear',
    async () => {
      const daemon = await startDaemon({ args: [...tcp, '--tls', 'require', '--tls-certificates', server] });
      expect(daemon.ready.uris[1]).toBe(`nbds://127.0.0.1:${portOf(daemon)}/disk`);
      const uri = nbds(daemon, anonymous);
      expect((await ok('nbdinfo', ['--size', uri])).trim()).toBe(String(16 * MIB));
      expect(await ok('nbdinfo', ['--list', uri])).toContain('protocol: newstyle-fixed with TLS');
      const source = randomFile(16 * MIB);
      const copy = path.join(path.dirname(source), 'out.img');
      await ok('nbdcopy', ['--flush', source, uri]);
      await ok('nbdcopy', [uri, copy]);
      expect(sha256(copy)).toBe(sha256(source));
      refused(await run('nbdinfo', [`nbd://localhost:${portOf(daemon)}/disk`]));
      // A client that expects another authority, or another name, refuses our certificate.
      refused(await run('nbdinfo', ['--size', nbds(daemon, path.join(pki, 'other-ca'))]));
      // The command line connects without TLS.
      expect(
        (await cli(['export', 'disk', path.join(path.dirname(source), 'own.img')], { store: daemon.store })).code,
      ).toBe(0);
      await daemon.logged(/"tls":"TLSv1\.[23] /);
      expect((await daemon.stop()).code).toBe(0);
    },
  );

  needsKeys('nbdinfo')('a client certificate is asked for, checked, and named in the log', async () => {
    const daemon = await startDaemon({
      args: [...tcp, '--tls', 'require', '--tls-certificates', server, '--tls-verify-peer'],
    });
    await ok('nbdinfo', ['--size', nbds(daemon, client)]);
    await waitUntil(() => daemon.log().includes('"certificate":["backup-host"]'), 'the certificate is in the log');
    refused(await run('nbdinfo', ['--size', nbds(daemon, anonymous)]));
    refused(await run('nbdinfo', ['--size', nbds(daemon, stranger)]));
    await waitUntil(() => daemon.log().match(/TLS handshake failed/g)?.length === 2, 'both refusals are in the log');
    await ok('nbdinfo', ['--size', nbds(daemon, client)]);
    expect((await daemon.stop()).code).toBe(0);
  });

  needsKeys('nbd-client')(
    'nbd-client with the options of docs/tls.md lists, and opens over TLS; not without',
    async () => {
      const daemon = await startDaemon({
        args: [...tcp, '--default', 'disk', '--tls', 'require', '--tls-certificates', server, '--tls-verify-peer'],
      });
      const text = fs.readFileSync(path.resolve(import.meta.dirname, '../../docs/tls.md'), 'utf8');
      const [, documented = ''] = /^ +nbd-client server\.example \/dev\/nbd0 -N vm1 (?:.*\\\n)?(.*)$/m.exec(text) ?? [];
      const options = documented.trim().replaceAll('DIR', client).replace('server.example', 'localhost').split(/\s+/);
      expect(options.filter((word) => word.startsWith('-'))).toHaveLength(4);
      const port = portOf(daemon);
      expect(await ok('nbd-client', ['-l', '127.0.0.1', port, ...options])).toMatch(/^disk: /m);
      // Without the kernel's module it fails only at the device, after the export is open.
      const device = path.join(temporaryDirectory(), 'device');
      fs.writeFileSync(device, '');
      // With -L (no netlink), nbd-client 3.27 needs -N. Over netlink it refuses this device, after opening the export.
      for (const way of [['-L', '-N', 'disk'], ['-L', '-N', ''], []]) {
        await run('nbd-client', ['127.0.0.1', port, device, ...way, ...options]);
      }
      const opened = /"tls":"TLSv1[^\n]*"export":"disk","msg":"connection open"/g;
      await waitUntil(
        () => daemon.log().match(opened)?.length === 3,
        'it has opened the disk, with its name, with an empty one and without -N',
      );
      const plain = await run('nbd-client', ['-l', '127.0.0.1', port]);
      expect(plain.code).not.toBe(0);
      expect((await daemon.stop()).code).toBe(0);
    },
  );

  needsKeys('nbdinfo')('rules by certificate decide who sees and opens what, and are reloaded on SIGHUP', async () => {
    const access = path.join(temporaryDirectory(), 'access');
    fs.writeFileSync(access, `allow disk ro from cert:backup-host\nallow own from uid:${process.getuid?.()}\n`);
    const daemon = await startDaemon({
      args: [
        ...[...tcp, '--create', 'secret:1M', '--access', access],
        ...['--tls', 'require', '--tls-certificates', server, '--tls-verify-peer'],
      ],
    });
    const isReadOnly = async (): Promise<boolean> =>
      (await run('nbdinfo', ['--is', 'read-only', nbds(daemon, client)])).code === 0;
    expect(await isReadOnly()).toBe(true);
    const list = await ok('nbdinfo', ['--list', '--json', nbds(daemon, client)]);
    expect(list).not.toContain('secret');
    // The same answer for an export that does not exist.
    const [hidden, missing] = await Promise.all(
      ['secret', 'missing'].map(async (name) => refused(await run('nbdinfo', [nbds(daemon, client, name)]))),
    );
    expect(hidden).toContain('secret');
    expect(missing).toBe(hidden?.replaceAll('secret', 'missing'));

    fs.writeFileSync(access, 'allow disk from nobody\n');
    daemon.child.kill('SIGHUP');
    await waitUntil(() => daemon.log().includes('not reloaded'), 'the bad file is refused');
    await daemon.logged(`${access}:1: source \\"nobody\\"`);
    expect(await isReadOnly()).toBe(true);
    fs.writeFileSync(access, 'allow disk from cert:backup-host\n');
    daemon.child.kill('SIGHUP');
    await waitUntil(() => daemon.log().includes('"msg":"reloaded"'), 'the good file is taken');
    expect(await isReadOnly()).toBe(false);
    expect((await daemon.stop()).code).toBe(0);
  });

  needsKeys('nbdinfo')(
    'SIGHUP brings new certificates to the next connection, and bad ones change nothing',
    async () => {
      const directory = path.join(temporaryDirectory(), 'server');
      fs.cpSync(server, directory, { recursive: true });
      const daemon = await startDaemon({ args: [...tcp, '--tls', 'require', '--tls-certificates', directory] });
      await ok('nbdinfo', ['--size', nbds(daemon, anonymous)]);
      fs.writeFileSync(path.join(directory, 'server-cert.pem'), 'nonsense');
      daemon.child.kill('SIGHUP');
      await waitUntil(() => daemon.log().includes('TLS keys not reloaded'), 'the bad certificate is refused');
      await ok('nbdinfo', ['--size', nbds(daemon, anonymous)]);
      const next = await Authority.make(path.join(pki, 'next-ca'), 'next authority');
      await next.sign('server', 'localhost', directory, 'DNS:localhost');
      daemon.child.kill('SIGHUP');
      await waitUntil(() => daemon.log().includes('"msg":"reloaded"'), 'the new certificate is taken');
      refused(await run('nbdinfo', ['--size', nbds(daemon, anonymous)]));
      await ok('nbdinfo', ['--size', nbds(daemon, next.directory)]);
      expect((await daemon.stop()).code).toBe(0);
    },
  );
});

describe('revocation', () => {
  needsKeys('nbdinfo')('a revoked client certificate stays out from the reload of ca-crl.pem on', async () => {
    const directory = temporaryDirectory();
    const authority = await Authority.make(path.join(directory, 'ca'));
    const own = path.join(directory, 'server');
    await authority.sign('server', 'localhost', own, 'DNS:localhost');
    const [good, bad] = [path.join(directory, 'good'), path.join(directory, 'bad')];
    await authority.sign('client', 'good', good);
    const revoked = await authority.sign('client', 'bad', bad);
    await authority.revoke([], path.join(own, 'ca-crl.pem'));
    const daemon = await startDaemon({
      args: [...tcp, '--tls', 'require', '--tls-certificates', own, '--tls-verify-peer'],
    });
    for (const each of [good, bad]) await ok('nbdinfo', ['--size', nbds(daemon, each)]);
    await authority.revoke([revoked.cert], path.join(own, 'ca-crl.pem'));
    daemon.child.kill('SIGHUP');
    await waitUntil(() => daemon.log().includes('"msg":"reloaded"'), 'the list is taken');
    await ok('nbdinfo', ['--size', nbds(daemon, good)]);
    refused(await run('nbdinfo', ['--size', nbds(daemon, bad)]));
    await waitUntil(() => daemon.log().includes('CERT_REVOKED'), 'the reason is in the log');
    expect((await daemon.stop()).code).toBe(0);
  });
});

describe('pre-shared keys', () => {
  needsKeys('nbdcopy', 'nbdinfo')('nbdcopy uses nbds+unix with a key, and a wrong key or user stays out', async () => {
    const daemon = await startDaemon({ args: [...tcp, '--tls-psk', keys] });
    const source = randomFile(16 * MIB);
    const copy = path.join(path.dirname(source), 'out.img');
    await ok('nbdcopy', ['--flush', source, pskUri(daemon)]);
    await ok('nbdcopy', [pskUri(daemon), copy]);
    expect(sha256(copy)).toBe(sha256(source));
    await daemon.logged('"pskUser":"alice"');
    const wrong = path.join(temporaryDirectory(), 'wrong.psk');
    fs.writeFileSync(wrong, `alice:${KEY.replace('00', '01')}\nbob:${KEY}\n`);
    refused(await run('nbdinfo', [pskUri(daemon, 'alice', wrong)]));
    refused(await run('nbdinfo', [pskUri(daemon, 'bob', wrong)]));
    refused(await run('nbdinfo', [daemon.uri('disk')]));
    await ok('nbdinfo', ['--size', pskUri(daemon)]);
    expect((await daemon.stop()).code).toBe(0);
  });

  needsKeys('nbdkit', 'nbdcopy')("nbdkit's nbd plugin with tls=require serves us on", async () => {
    const daemon = await startDaemon({ args: [...tcp, '--tls-psk', keys, '--tls-certificates', server] });
    const source = randomFile(16 * MIB);
    const directory = path.dirname(source);
    for (const how of [
      [`socket=${daemon.socket}`, 'tls=require', `tls-psk=${keys}`, 'tls-username=alice'],
      ['hostname=localhost', `port=${portOf(daemon)}`, 'tls=require', `tls-certificates=${anonymous}`],
    ]) {
      const inner = `nbdcopy ${source} "$uri" && nbdcopy "$uri" ${directory}/out.img && cmp ${source} ${directory}/out.img`;
      await ok('nbdkit', ['-U', '-', 'nbd', ...how, 'export=disk', '--run', inner]);
    }
    expect((await daemon.stop()).code).toBe(0);
  });
});

describe('qemu', () => {
  needsKeys('qemu-img', 'qemu-io')('qemu-io writes and qemu-img reads with certificates and with a key', async () => {
    const daemon = await startDaemon({ args: [...tcp, '--tls-psk', keys, '--tls-certificates', server] });
    const pskDirectory = path.join(temporaryDirectory(), 'psk');
    fs.mkdirSync(pskDirectory);
    fs.copyFileSync(keys, path.join(pskDirectory, 'keys.psk'));
    const byCertificate = [
      ...['--object', `tls-creds-x509,id=tls0,dir=${anonymous},endpoint=client`, '--image-opts'],
      `driver=nbd,host=localhost,port=${portOf(daemon)},export=disk,tls-creds=tls0`,
    ];
    const byKey = [
      ...['--object', `tls-creds-psk,id=tls0,dir=${pskDirectory},endpoint=client,username=alice`, '--image-opts'],
      `driver=nbd,path=${daemon.socket},export=disk,tls-creds=tls0`,
    ];
    for (const [index, how] of [byCertificate, byKey].entries()) {
      const pattern = `0x${index + 1}7`;
      const commands = [`write -P ${pattern} 1M 3M`, 'flush', `read -P ${pattern} 1M 3M`, 'read -P 0 8M 1M'];
      const seen = await ok('qemu-io', [...commands.flatMap((command) => ['-c', command]), ...how]);
      expect(seen).not.toMatch(/fail/i);
      expect(await ok('qemu-img', ['info', ...how])).toContain('16 MiB');
    }
    const plain = await run('qemu-img', ['info', `nbd://localhost:${portOf(daemon)}/disk`]);
    expect(refused(plain)).toMatch(/TLS/);
    expect((await daemon.stop()).code).toBe(0);
  });
});

describe.runIf(hasOwnClients)('input that must be refused', () => {
  needsKeys()(
    'openssl s_client, which speaks TLS from the first byte, is turned away and named in the log',
    async () => {
      const daemon = await startDaemon({ args: [...tcp, '--tls', 'require', '--tls-certificates', server] });
      refused(await run('openssl', ['s_client', '-connect', `127.0.0.1:${portOf(daemon)}`], { input: '' }));
      await waitUntil(() => daemon.log().includes('NBD_OPT_STARTTLS'), 'the reason is in the log');
      expect((await cli(['vdi', 'list'], { store: daemon.store })).code).toBe(0);
      expect((await daemon.stop()).code).toBe(0);
    },
  );

  needsKeys()('an address others can reach is served in the clear only if that is asked for', async () => {
    const store = path.join(temporaryDirectory(), 'store');
    const serve = (...args: string[]): Promise<RunResult> =>
      run(process.execPath, [BIN, 'serve', '--store', store, '--listen', 'tcp:0.0.0.0:0', ...args]);
    for (const args of [[], ['--tls', 'off'], ['--tls', 'on', '--tls-certificates', server]]) {
      const result = await serve(...args);
      expect(result.code).toBe(1);
      expect(result.stderr).toMatch(/tcp:0\.0\.0\.0:0 can be reached from other machines.*--allow-plaintext/);
    }
    for (const args of [
      ['--allow-plaintext'],
      ['--tls', 'require', '--tls-certificates', server],
      ['--tls-psk', keys],
    ]) {
      const daemon = await startDaemon({ args: ['--listen', 'tcp:0.0.0.0:0', ...args] });
      expect((await daemon.stop()).code).toBe(0);
    }
  });

  needsKeys()('keys and files that do not fit are one clear line at start', async () => {
    const directory = temporaryDirectory();
    const write = (name: string, text: string): string => {
      fs.writeFileSync(path.join(directory, name), text, { mode: 0o600 });
      return path.join(directory, name);
    };
    const mixed = path.join(directory, 'mixed');
    fs.cpSync(server, mixed, { recursive: true });
    fs.copyFileSync(path.join(client, 'client-key.pem'), path.join(mixed, 'server-key.pem'));
    const cases: readonly (readonly [string[], RegExp])[] = [
      [['--tls', 'require'], /TLS needs keys: give --tls-certificates DIR or --tls-psk FILE/],
      [['--tls-certificates', directory], /server-cert\.pem does not exist/],
      [['--tls-certificates', mixed], /server-key\.pem is not the key of .*server-cert\.pem/],
      [['--tls-verify-peer', '--tls-psk', keys], /needs --tls-certificates DIR with ca-cert\.pem/],
      [['--tls-psk', write('a', 'alice\n')], /a:1: no USER:HEXKEY/],
      [['--tls-psk', write('b', `alice:${KEY}\nbob:xyz\n`)], /b:2: the key of "bob" is not hexadecimal/],
      [['--tls-psk', write('c', 'alice:0011\n')], /c:1: the key of "alice" has 2 bytes; give 16 to 512/],
      [['--tls-psk', write('d', '')], /d has no keys/],
      [['--access', write('e', 'allow x from cert:y')], /e:1: cert:y is never proven without --tls-verify-peer/],
      [['--access', write('f', 'allow x from psk:y')], /f:1: psk:y is never proven without --tls-psk FILE/],
      [['--access', path.join(directory, 'none')], /the access file .*none cannot be read/],
    ];
    for (const [args, message] of cases) {
      const result = await run(process.execPath, [
        ...[BIN, 'serve', '--store', path.join(directory, 'store'), '--listen', `unix:${directory}/s`, ...args],
      ]);
      expect(result.stderr).toMatch(message);
      expect(result.stderr.trim().split('\n')).toHaveLength(1);
      expect(result.code).toBe(1);
    }
  });
});
