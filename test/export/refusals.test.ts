/** What the operator is told of exports that a client asked for and did not get. */
import path from 'node:path';
import { expect, onTestFinished, test } from 'vitest';
import { VdiExports } from '../../src/export/vdi-exports.js';
import { LocalStore } from '../../src/store/local/local-store.js';
import { StoreError } from '../../src/store/object-store.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { temporaryDirectory } from '../harness/daemon.js';

test('an export that its store cannot open is in the log as an error with the cause, once, though clients come back', async () => {
  const store = await LocalStore.open(path.join(temporaryDirectory(), 'store'));
  const catalog = new VdiCatalog(store);
  onTestFinished(() => catalog.close().catch(() => undefined));
  await catalog.create('disk', 2 ** 20, { blockSizeShift: 20 });
  const lines: string[] = [];
  const errors: string[] = [];
  const exports = new VdiExports(catalog, {
    log: (line) => lines.push(line),
    logError: (line) => errors.push(line),
  });
  store.catalog.open = () => Promise.reject(new StoreError('IO', 'reading metadata: EIO'));
  const peer = {} as Parameters<VdiExports['open']>[1];
  for (let n = 0; n < 3; n++) await expect(exports.open('disk', peer)).rejects.toMatchObject({ code: 'FAILED' });
  await expect(exports.open('other', peer)).rejects.toMatchObject({ code: 'UNKNOWN' });
  expect(errors).toEqual(['export "disk" cannot be opened: reading metadata: EIO']);
  expect(lines).toEqual([]);
});
