/** What the operator's log says of failures that neither a device nor an export has logged. */
import type { Logger } from 'pino';
import { expect, onTestFinished, test, vi } from 'vitest';
import { NbdClient, type BlockDevice } from 'nbd-server-ts';
import { DeviceError, ExportError, type ExportProvider } from 'nbd-server-ts/block-device';
import { NbdSessions } from '../../src/daemon/control/nbd-sessions.js';
import { DeadPeerTimeouts } from '../../src/daemon/dead-peer-timeouts.js';
import { RepeatedLines } from '../../src/daemon/log/repeated-lines.js';
import { makeLoggedServer } from '../../src/daemon/logged-server.js';

const INFO = { name: 'vm1', description: '' };
const GEOMETRY = { size: 2 ** 20, contexts: [] };
const DISK: BlockDevice = {
  geometry: GEOMETRY,
  read: () => undefined,
  write: () => undefined,
  flush: () => undefined,
  close: () => undefined,
};

async function served(given: Partial<BlockDevice>, open?: ExportProvider['open'], openTimeoutMs = 120_000) {
  const errors: Record<string, unknown>[] = [];
  const error = (details: object, msg: string): void => void errors.push({ ...details, msg });
  const log = { info: () => undefined, warn: () => undefined, error } as unknown as Logger;
  const lines = new RepeatedLines();
  const device = { ...DISK, ...given };
  const server = makeLoggedServer({
    provider: {
      list: () => [INFO],
      describe: () => ({ geometry: GEOMETRY, info: INFO }),
      open: open ?? (() => ({ device, info: INFO })),
    },
    tls: undefined,
    limits: { openTimeoutMs },
    ...{
      log,
      repeated: { ofStore: lines, ofPeers: lines },
      deadPeers: new DeadPeerTimeouts(0),
      sessions: new NbdSessions(),
      debug: false,
    },
  });
  onTestFinished(() => {
    server.destroy();
    lines.close();
  });
  const bound = await server.listen({ host: '127.0.0.1', port: 0 });
  if (bound.transport !== 'tcp') throw new Error('not TCP');
  const connect = async (): Promise<NbdClient> => {
    const client = await NbdClient.connect({ host: '127.0.0.1', port: bound.port });
    onTestFinished(() => client.destroy());
    return client;
  };
  return { errors, connect };
}

test('a bug in a device: the line names the command, the disk and the error', async () => {
  const { errors, connect } = await served({
    read: () => {
      throw new TypeError('no such method');
    },
  });
  const client = await connect();
  await client.go('vm1');
  await expect(client.read(0, 512)).rejects.toThrow();
  expect(errors).toMatchObject([
    {
      msg: 'vm1: READ failed: no such method',
      connection: 1,
      export: 'vm1',
      peer: expect.stringContaining('127.0.0.1') as string,
    },
  ]);
});

test('a device that fails to close is no failed request', async () => {
  const { errors, connect } = await served({
    close: () => Promise.reject(new DeviceError('EIO', 'cannot write its map')),
  });
  const client = await connect();
  await client.go('vm1');
  client.destroy();
  await vi.waitFor(() =>
    expect(errors).toMatchObject([{ msg: 'vm1: close failed: cannot write its map', export: 'vm1' }]),
  );
});

test('what the device and the exports log themselves is not logged twice', async () => {
  let opens = 0;
  const device = { ...DISK, read: () => Promise.reject(new DeviceError('EIO', 'gone')) };
  const { errors, connect } = await served({}, () => {
    if (opens++ === 0) throw new ExportError('FAILED', 'the store fails');
    return { device, info: INFO };
  });
  const client = await connect();
  await expect(client.go('vm1')).rejects.toThrow('the store fails');
  await client.go('vm1');
  await expect(client.read(0, 512)).rejects.toThrow('gone');
  expect(errors).toEqual([]);
});

test('an export that never opens, and is refused at last since too many wait for it, is told', async () => {
  const { errors, connect } = await served({}, () => new Promise(() => undefined), 50);
  const wait = async (): Promise<void> => void (await (await connect()).go('vm1').catch(() => undefined));
  await Promise.all(Array.from({ length: 64 }, wait));
  await wait();
  expect(errors).toMatchObject([
    {
      msg: 'the export "vm1" does not answer: 64 earlier connections still wait for it',
      export: 'vm1',
    },
  ]);
});
