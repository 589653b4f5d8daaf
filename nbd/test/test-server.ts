/**
 * A server for one test, on a unix socket in its own directory; its reports are kept. Owns the cleanup: whatever the test
 * does, sockets, server and directory are removed at its end.
 */

import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { onTestFinished } from 'vitest';
import {
  NbdClient,
  NbdServer,
  type ConnectionCloseEvent,
  type ConnectionOpenEvent,
  type Limits,
  type RequestEvent,
} from '../src/index.js';
import { RawClient } from './raw-client.js';
import { TestExport, TestProvider } from './test-device.js';

/** Time limit for a condition, milliseconds. */
const CONDITION_BOUND_MS = 20_000;

/** Wait until `condition` holds. */
export async function until(condition: () => boolean, what: string): Promise<void> {
  const end = Date.now() + CONDITION_BOUND_MS;
  while (!condition()) {
    if (Date.now() > end) throw new Error(`waited ${CONDITION_BOUND_MS} ms until ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 1));
  }
}

export async function temporaryDirectory(): Promise<string> {
  const directory = await mkdtemp(join(tmpdir(), 'nbd-test-'));
  onTestFinished(() => rm(directory, { recursive: true, force: true }));
  return directory;
}

export interface TestServer {
  readonly server: NbdServer;
  readonly provider: TestProvider;
  readonly path: string;
  readonly opens: ConnectionOpenEvent[];
  readonly closes: ConnectionCloseEvent[];
  readonly requests: RequestEvent[];
  /** Errors that are bugs of a device or provider. */
  readonly deviceErrors: { readonly error: unknown; readonly exportName: string | undefined }[];
  /** A connection that has sent nothing yet. */
  raw(): Promise<RawClient>;
  /** A connection in the transmission phase. */
  opened(exportName?: string): Promise<RawClient>;
  /** The library's own client, with the export open. */
  client(exportName?: string): Promise<NbdClient>;
  /** Waits until no connection is left, and checks that every device was closed once and not used after that. */
  allOver(): Promise<void>;
}

/** A listening server, by default with an export "disk" that supports everything. */
export async function startServer(
  options: { readonly exports?: readonly TestExport[]; readonly limits?: Partial<Limits> } = {},
): Promise<TestServer> {
  const directory = await temporaryDirectory();
  const path = join(directory, 'nbd.sock');
  const provider = new TestProvider(options.exports ?? [new TestExport('disk')]);
  const opens: ConnectionOpenEvent[] = [];
  const closes: ConnectionCloseEvent[] = [];
  const requests: RequestEvent[] = [];
  const deviceErrors: { error: unknown; exportName: string | undefined }[] = [];
  const server = new NbdServer({
    provider,
    limits: options.limits,
    observer: {
      onConnectionOpen: (event) => opens.push(event),
      onConnectionClose: (event) => closes.push(event),
      onRequest: (event) => requests.push(event),
      onError: (error, { exportName, expected }) => {
        if (!expected) deviceErrors.push({ error, exportName });
      },
    },
  });
  onTestFinished(() => server.destroy());
  await server.listen({ path });

  const raw = (): Promise<RawClient> => RawClient.connect({ path });
  return {
    server,
    provider,
    path,
    opens,
    closes,
    requests,
    deviceErrors,
    raw,
    async opened(exportName = 'disk') {
      const client = await raw();
      await client.open(exportName);
      return client;
    },
    async client(exportName = 'disk') {
      const client = await NbdClient.connect({ path });
      onTestFinished(() => client.destroy());
      await client.go(exportName);
      return client;
    },
    async allOver() {
      await until(() => server.connections.size === 0, 'no connection is left');
      if (provider.openNow !== 0) throw new Error(`${provider.openNow} devices were left open`);
      if (provider.breaches.length > 0) throw new Error(`a device was ${provider.breaches.join(', ')}`);
    },
  };
}
