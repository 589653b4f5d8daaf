/** The examples run unchanged, and the README begins with the exact text of the first one. */

import { execFile, spawn } from 'node:child_process';
import fs from 'node:fs';
import { mkdir, readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { expect, onTestFinished, test } from 'vitest';
import { NbdClient, parseNbdUri } from '../src/index.js';
import { temporaryDirectory } from './test-server.js';

const run = promisify(execFile);
const example = (name: string): string => fileURLToPath(new URL(`../examples/${name}.mjs`, import.meta.url));
const README = fileURLToPath(new URL('../README.md', import.meta.url));

/** A running example, and the first line that it has printed. */
async function started(name: string, ...args: string[]): Promise<{ readonly line: string; end(): Promise<unknown> }> {
  const child = spawn(process.execPath, [example(name), ...args], { stdio: ['ignore', 'pipe', 'inherit'] });
  onTestFinished(() => void child.kill('SIGKILL'));
  const ended = new Promise((resolve) => child.once('exit', (code) => resolve(code)));
  const line = await new Promise<string>((resolve, reject) => {
    child.stdout.once('data', (text: Buffer) => resolve(text.toString().trim()));
    child.once('exit', () => reject(new Error('the example ended')));
  });
  return {
    line,
    end() {
      child.kill('SIGTERM');
      return ended;
    },
  };
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
  expect(await ram.end()).toBe(0);
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
  expect(await server.end()).toBe(0);
});

test('the README begins with the exact text of the first example', () => {
  const shown = /```js\n([^]*?)```/.exec(fs.readFileSync(README, 'utf8'))?.[1];
  expect(shown).toBe(fs.readFileSync(example('ram-disk'), 'utf8'));
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
