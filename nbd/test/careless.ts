/**
 * A server for devices and providers that are written carelessly, as plain JavaScript may be: anything can be given for
 * anything. Its errors are kept; the cleanup is the test's end.
 */

import { join } from 'node:path';
import { onTestFinished } from 'vitest';
import {
  NbdClient,
  NbdServer,
  type ClientOptions,
  type ErrorContext,
  type ServerObserver,
  type ServerOptions,
} from '../src/index.js';
import { RawClient } from './raw-client.js';
import { temporaryDirectory } from './test-server.js';

export const INFO = { name: 'disk', description: '' };

export interface CarelessServer {
  readonly server: NbdServer;
  readonly path: string;
  readonly errors: { readonly error: unknown; readonly context: ErrorContext }[];
  /** The messages of `errors`. */
  readonly messages: () => string[];
  /** A client with the export open. */
  client(options?: Partial<ClientOptions>, exportName?: string): Promise<NbdClient>;
  raw(): Promise<RawClient>;
}

/** `device` as the export "disk" of a provider. */
export function only(device: unknown): unknown {
  return {
    list: () => [INFO],
    describe: () => ({ geometry: (device as { geometry?: unknown }).geometry ?? device, info: INFO }),
    open: () => ({ device, info: INFO }),
  };
}

/** `observer`: instead of the one that keeps the errors; null for none. */
export async function careless(
  provider: unknown,
  options: Partial<ServerOptions> = {},
  observer?: object | null,
): Promise<CarelessServer> {
  const path = join(await temporaryDirectory(), 'nbd.sock');
  const errors: { error: unknown; context: ErrorContext }[] = [];
  const keeping: ServerObserver = { onError: (error, context) => errors.push({ error, context }) };
  const server = new NbdServer({
    provider: provider as ServerOptions['provider'],
    ...(observer === null ? {} : { observer: { ...keeping, ...observer } }),
    ...options,
  });
  onTestFinished(() => server.destroy());
  await server.listen({ path });
  return {
    ...{ server, path, errors },
    messages: () => errors.map(({ error }) => (error instanceof Error ? error.message : String(error))),
    async client(clientOptions = {}, exportName = 'disk') {
      const client = await NbdClient.connect({ path, ...clientOptions });
      onTestFinished(() => client.destroy());
      await client.go(exportName);
      return client;
    },
    raw: () => RawClient.connect({ path }),
  };
}

/** Exceptions and rejections that nobody caught, until the test ends. */
export function strays(): unknown[] {
  const found: unknown[] = [];
  const keep = (error: unknown): void => void found.push(error);
  process.on('uncaughtException', keep).on('unhandledRejection', keep);
  onTestFinished(() => void process.off('uncaughtException', keep).off('unhandledRejection', keep));
  return found;
}

/** Several turns of the event loop: what is uncaught has been reported. */
export async function turns(): Promise<void> {
  for (let turn = 0; turn < 5; turn++) await new Promise((resolve) => setImmediate(resolve));
}
