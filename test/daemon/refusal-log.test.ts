/** The operator's log of exports that clients were refused. */
import path from 'node:path';
import type { Logger } from 'pino';
import { beforeEach, expect, onTestFinished, test } from 'vitest';
import { ExportError, type ExportProvider, type Peer } from 'nbd-server-ts/block-device';
import { LoggedExports } from '../../src/daemon/log/refusal-log.js';
import { RepeatedLines } from '../../src/daemon/log/repeated-lines.js';
import { ExportsWithClientMessages } from '../../src/export/client-messages.js';
import { VdiExports } from '../../src/export/vdi-exports.js';
import { LocalStore } from '../../src/store/local/local-store.js';
import { StoreError } from '../../src/store/store-error.js';
import { CatalogError } from '../../src/vdi/catalog-error.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { temporaryDirectory } from '../harness/daemon.js';

const LAN: Peer = { transport: 'tcp', address: '192.0.2.7:4242', host: '192.0.2.7' };
const OURS: Peer = { transport: 'internal', address: '1' };

let written: { readonly level: string; readonly details: Record<string, unknown>; readonly text: string }[];
let lines: RepeatedLines;

beforeEach(() => {
  written = [];
  lines = new RepeatedLines();
  onTestFinished(() => lines.close());
});

function logged(provider: ExportProvider): LoggedExports {
  const at = (level: string) => (details: Record<string, unknown>, text: string) =>
    void written.push({ level, details, text });
  const log = { info: at('info'), warn: at('warn'), error: at('error') } as unknown as Logger;
  return new LoggedExports(new ExportsWithClientMessages(provider), log, { ofStore: lines, ofPeers: lines });
}

/** Exports that refuse every call. */
function refusing(error: () => Error): LoggedExports {
  return logged({
    list: () => Promise.reject(error()),
    describe: () => Promise.reject(error()),
    open: () => Promise.reject(error()),
  });
}

test('an export that the store cannot open is logged once as an error with its cause, although clients retry', async () => {
  const store = await LocalStore.open(path.join(temporaryDirectory(), 'store'));
  const catalog = new VdiCatalog(store);
  onTestFinished(() => catalog.close().catch(() => undefined));
  await catalog.create('disk', 2 ** 20, { blockSizeShift: 20 });
  const exports = logged(new VdiExports(catalog));
  store.catalog.open = () => Promise.reject(new StoreError('IO', 'reading metadata: EIO'));
  for (let port = 1; port <= 3; port++) {
    const peer = { ...LAN, address: `192.0.2.7:${port}` };
    await expect(exports.open('disk', peer)).rejects.toMatchObject({ code: 'FAILED' });
  }
  await expect(exports.open('disk', OURS)).rejects.toMatchObject({ code: 'FAILED' });
  await expect(exports.open('other', LAN)).rejects.toMatchObject({ code: 'UNKNOWN' });
  expect(written).toMatchObject([
    {
      level: 'error',
      details: { export: 'disk', peer: 'tcp 192.0.2.7:1', err: { code: 'IO' } },
      text: 'export "disk" cannot be opened: reading metadata: EIO',
    },
    {
      level: 'info',
      details: { export: 'other', peer: 'tcp 192.0.2.7:4242' },
      text: expect.stringMatching(
        /^export "other" refused: no VDI named "other" in \/.*'sheepgate vdi list'/,
      ) as string,
    },
  ]);
  lines.close();
  expect(written.at(-1)?.text).toMatch(/cannot be opened: reading metadata: EIO \(the last of 3 in \d+ s\)$/);
});

test('an access refusal is a warning, and so is an obstacle; a wrong name and missing TLS are logged as info', async () => {
  for (const [error, level] of [
    [new ExportError('POLICY', 'you are not allowed to open "vm"'), 'warn'],
    [asRefused(new CatalogError('UNFINISHED', 'an import was cut off')), 'warn'],
    [asRefused(new CatalogError('ENDED', 'it has ended')), 'warn'],
    [asRefused(new CatalogError('NO_TAG', 'no such tag')), 'info'],
    [asRefused(new CatalogError('BAD_NAME', 'no name')), 'info'],
    [new ExportError('TLS_REQUIRED', 'TLS is needed'), 'info'],
    [new ExportError('SHUTDOWN', 'it stops'), 'info'],
  ] as const) {
    written = [];
    const { message } = error.cause instanceof Error ? error.cause : error;
    await expect(refusing(() => error).open('vm', LAN)).rejects.toThrow();
    expect(written).toMatchObject([{ level, text: `export "vm" refused: ${message}` }]);
    // Our own commands report it themselves.
    await expect(refusing(() => error).describe('vm', OURS)).rejects.toThrow();
    expect(written).toHaveLength(1);
  }
});

test('a client that requests a thousand names causes a bounded number of lines, and does not suppress lines of others', async () => {
  const exports = refusing(() => new ExportError('POLICY', 'no'));
  for (let n = 0; n < 1000; n++) await expect(exports.open(`x${n}`, LAN)).rejects.toThrow('no');
  expect(written.length).toBeLessThan(20);
  written = [];
  await expect(exports.open('vm', { ...LAN, host: '192.0.2.8' })).rejects.toThrow('no');
  expect(written).toHaveLength(1);
});

test('a client that requests an export in two ways on one connection has one line', async () => {
  const exports = refusing(() => new ExportError('POLICY', 'no'));
  await expect(exports.describe('vm', LAN)).rejects.toThrow('no');
  await expect(exports.open('vm', LAN)).rejects.toThrow('no');
  lines.close();
  expect(written).toHaveLength(1);
});

test('a list that fails is an error in the log, and the client does not learn the cause', async () => {
  const exports = refusing(() => new StoreError('IO', '/secret: EIO'));
  await expect((async () => exports.list(LAN))()).rejects.toMatchObject({
    code: 'FAILED',
    message: expect.not.stringContaining('secret') as string,
  });
  expect(written).toMatchObject([{ level: 'error', text: 'the exports cannot be listed: /secret: EIO' }]);
});

function asRefused(cause: CatalogError): ExportError {
  return new ExportError('UNKNOWN', cause.message, { cause });
}
