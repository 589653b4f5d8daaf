/** The examples run unchanged, and the README shows their exact text. */

import { execFile, spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import fs from 'node:fs';
import { mkdir, readFile, writeFile } from 'node:fs/promises';
import http from 'node:http';
import type { AddressInfo } from 'node:net';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { expect, onTestFinished, test } from 'vitest';
import { NbdClient, parseNbdUri } from '../src/index.js';
import { temporaryDirectory } from './test-server.js';

const run = promisify(execFile);
const example = (name: string): string => fileURLToPath(new URL(`../examples/${name}.mjs`, import.meta.url));
const MIB = 1024 * 1024;
const README = fileURLToPath(new URL('../README.md', import.meta.url));

/** A running example. */
interface Started {
  /** The first line that it has printed. */
  readonly line: string;
  signal(): void;
  /** Its exit code. */
  readonly ended: Promise<unknown>;
}

async function started(name: string, ...args: string[]): Promise<Started> {
  const child = spawn(process.execPath, [example(name), ...args], { stdio: ['ignore', 'pipe', 'inherit'] });
  onTestFinished(() => void child.kill('SIGKILL'));
  const ended = new Promise((resolve) => child.once('exit', (code) => resolve(code)));
  const line = await new Promise<string>((resolve, reject) => {
    child.stdout.once('data', (text: Buffer) => resolve(text.toString().trim()));
    child.once('exit', () => reject(new Error('the example ended')));
  });
  return { line, ended, signal: () => void child.kill('SIGTERM') };
}

test('the RAM disk keeps written data, and ends on a signal', async () => {
  const path = join(await temporaryDirectory(), 'ram.sock');
  const ram = await started('ram-disk', `nbd+unix:///ram?socket=${path}`, '2');
  expect(ram.line).toBe(`nbd+unix:///ram?socket=${path}`);
  const client = await NbdClient.connect({ path });
  expect(await client.go('ram')).toMatchObject({ size: 2 * 1024 * 1024 });
  await client.write(12345, Buffer.from('kept'));
  await client.zero(12347, 1);
  expect((await client.read(12345, 4)).toString()).toBe('ke\0t');
  await client.disconnect();
  ram.signal();
  expect(await ram.ended).toBe(0);
});

test('many exports: each client has the disks of its name, and no others', async () => {
  const directory = await temporaryDirectory();
  const [disks, certificates] = [join(directory, 'disks'), join(directory, 'certificates')];
  await mkdir(join(disks, 'alice'), { recursive: true });
  await mkdir(join(disks, 'bob'));
  await mkdir(certificates);
  await writeFile(join(disks, 'alice', 'disk'), Buffer.alloc(1024 * 1024, 'a'));
  await writeFile(join(disks, 'bob', 'disk'), Buffer.alloc(512 * 1024, 'b'));
  await makeCertificates(certificates, ['alice', 'bob', 'mallory']);

  const server = await started('many-exports', disks, certificates, 'nbds://localhost:0');
  const address = parseNbdUri(server.line);
  if (address.transport !== 'tcp') throw new Error('no port');
  const as = async (user: string): Promise<NbdClient> => {
    const pem = (name: string): Promise<string> => readFile(join(certificates, `${name}.pem`), 'utf8');
    const certificate = { chain: await pem(`${user}-cert`), key: await pem(`${user}-key`) };
    const tls = { authorities: await pem('ca-cert'), certificate, serverName: 'localhost' };
    const client = await NbdClient.connect({ host: address.host, port: address.port, tls });
    onTestFinished(() => client.destroy());
    return client;
  };
  const [alice, bob, mallory] = [await as('alice'), await as('bob'), await as('mallory')];
  expect(await alice.list()).toMatchObject([{ name: 'disk' }]);
  expect(await mallory.list()).toEqual([]);
  await expect(alice.go('../bob/disk')).rejects.toThrow('there is no export');
  await expect(mallory.go('disk')).rejects.toThrow('there is no export');
  expect(await alice.go('disk')).toMatchObject({ size: 1024 * 1024 });
  expect(await bob.go('disk')).toMatchObject({ size: 512 * 1024 });
  await alice.write(0, Buffer.from('changed'), { fua: true });
  const second = await as('alice');
  await second.go('disk');
  expect((await second.read(0, 8)).toString()).toBe('changeda');
  expect((await bob.read(0, 4)).toString()).toBe('bbbb');
  // libnbd finds the keys of a client in a directory like this.
  for (const kind of ['cert', 'key']) {
    await fs.promises.copyFile(join(certificates, `alice-${kind}.pem`), join(certificates, `client-${kind}.pem`));
  }
  const uri = `nbds://localhost:${address.port}/disk?tls-certificates=${certificates}`;
  expect((await run('nbdinfo', ['--size', uri])).stdout.trim()).toBe(String(1024 * 1024));
  await Promise.all([alice, bob, second].map((client) => client.disconnect()));
  mallory.destroy();
  server.signal();
  expect(await server.ended).toBe(0);
});

test('a file: made sparse, written through, and closed after the last client has left', async () => {
  const directory = await temporaryDirectory();
  const [image, path] = [join(directory, 'disk.img'), join(directory, 'file.sock')];
  const server = await started('file', image, '8', `nbd+unix:///disk?socket=${path}`);
  expect(fs.statSync(image)).toMatchObject({ size: 8 * MIB, blocks: 0 });
  expect(fs.statSync(path).mode & 0o777).toBe(0o660);
  const client = await NbdClient.connect({ path });
  await client.go('disk');
  await client.write(4096, Buffer.from('kept'));
  await client.flush();
  expect((await readFile(image)).toString('latin1', 4096, 4100)).toBe('kept');
  server.signal();
  await expect.poll(() => fs.existsSync(path)).toBe(false);
  await client.write(8192, Buffer.from('late'), { fua: true });
  await client.disconnect();
  expect(await server.ended).toBe(0);
  expect((await readFile(image)).toString('latin1', 8192, 8196)).toBe('late');

  const again = await started('file', image, '8', `nbd+unix:///disk?socket=${path}`);
  const staying = await NbdClient.connect({ path });
  await staying.go('disk');
  again.signal();
  await expect.poll(() => fs.existsSync(path)).toBe(false);
  again.signal();
  expect(await again.ended).toBe(0);
  staying.destroy();
});

test('an image of a web server: read from there, and changed in memory only', async () => {
  const directory = await temporaryDirectory();
  const content = Buffer.alloc(MIB, 'web ');
  const web = http.createServer((request, response) => {
    const [from = 0, to = 0] = (/bytes=(\d+)-(\d+)/.exec(request.headers.range ?? '') ?? []).slice(1).map(Number);
    const body = content.subarray(from, to + 1);
    const range = `bytes ${from}-${from + body.length - 1}/${content.length}`;
    response.writeHead(206, { 'Content-Range': range, 'Content-Length': body.length, ETag: '"1"' }).end(body);
  });
  await new Promise<void>((resolve) => void web.listen(0, '127.0.0.1', resolve));
  onTestFinished(() => void web.close());
  const path = join(directory, 'image.sock');
  const url = `http://127.0.0.1:${(web.address() as AddressInfo).port}/disk.img`;
  const server = await started('web-image', url, `nbd+unix:///image?socket=${path}`);
  const client = await NbdClient.connect({ path });
  expect(await client.go('image')).toMatchObject({ size: MIB, readOnly: false });
  await client.write(2, Buffer.from('xx'));
  expect((await client.read(0, 8)).toString()).toBe('wexxweb ');
  expect(content.toString('latin1', 0, 8)).toBe('web web ');
  await client.disconnect();
  server.signal();
  expect(await server.ended).toBe(0);
});

test('copy: from one server to another, which is larger', async () => {
  const directory = await temporaryDirectory();
  const [from, to] = ['from', 'to'].map((name) => `nbd+unix:///ram?socket=${join(directory, name)}`) as [
    string,
    string,
  ];
  const servers = [await started('ram-disk', from, '4'), await started('ram-disk', to, '5')];
  const client = await NbdClient.connect({ uri: from });
  await client.go('ram');
  await client.write(MIB, randomBytes(MIB));
  const { stdout } = await run(process.execPath, [example('copy'), from, to]);
  expect(stdout).toBe(`${4 * MIB} bytes copied, 0 bytes of zeros\n`);
  const copied = await NbdClient.connect({ uri: to });
  await copied.go('ram');
  expect((await copied.read(0, 4 * MIB)).equals(await client.read(0, 4 * MIB))).toBe(true);
  await Promise.all([client.disconnect(), copied.disconnect()]);
  for (const server of servers) server.signal();
  expect(await Promise.all(servers.map(({ ended }) => ended))).toEqual([0, 0]);
});

test('the README shows the exact text of all examples, the RAM disk first', () => {
  const shown = [...fs.readFileSync(README, 'utf8').matchAll(/```js\n([^]*?)```/g)].map(([, text]) => text);
  const names = fs.readdirSync(join(README, '../examples')).map((file) => file.replace('.mjs', ''));
  const texts = names.map((name) => fs.readFileSync(example(name), 'utf8'));
  expect(shown[0]).toBe(fs.readFileSync(example('ram-disk'), 'utf8'));
  expect([...shown].sort()).toEqual(texts.sort());
});

/** An authority, the server's certificate for localhost, and one for each user. */
async function makeCertificates(directory: string, users: readonly string[]): Promise<void> {
  const place = (name: string): string => join(directory, name);
  const openssl = (...args: string[]): Promise<unknown> => run('openssl', args);
  const curve = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes'];
  await openssl(
    ...['req', '-x509', ...curve, '-subj', '/CN=authority', '-days', '30'],
    ...['-keyout', place('ca-key.pem'), '-out', place('ca-cert.pem')],
  );
  for (const name of ['server', ...users]) {
    const subject = name === 'server' ? 'localhost' : name;
    await openssl(
      ...['req', ...curve, '-subj', `/CN=${subject}`, '-keyout', place(`${name}-key.pem`), '-out', place('csr')],
    );
    await writeFile(place('ext'), `subjectAltName=DNS:${subject}\n`);
    await openssl(
      ...['x509', '-req', '-in', place('csr'), '-CA', place('ca-cert.pem'), '-CAkey', place('ca-key.pem')],
      ...['-CAcreateserial', '-days', '30', '-extfile', place('ext'), '-out', place(`${name}-cert.pem`)],
    );
  }
}
