/** A store with more disks than a handshake once allowed options, listed by every client and by our own command. */
import { expect } from 'vitest';
import { LocalStore } from '../../src/store/local/local-store.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { cliJson, needs, ok, startDaemon, temporaryDirectory } from '../harness/daemon.js';

const DISKS = 3_000;

needs('qemu-nbd', 'nbdinfo')('thousands of exports are listed by qemu-nbd, nbdinfo and vdi list', async () => {
  const store = `${temporaryDirectory()}/store`;
  const catalog = new VdiCatalog(await LocalStore.open(store));
  await Promise.all(Array.from({ length: DISKS }, (_, n) => catalog.create(`disk-${n}`, 2 ** 30)));
  await catalog.close();
  const daemon = await startDaemon({ store });
  expect(await ok('qemu-nbd', ['--list', '--socket', daemon.socket])).toContain(`exports available: ${DISKS}`);
  const { exports } = JSON.parse(await ok('nbdinfo', ['--list', '--json', `nbd+unix:///?socket=${daemon.socket}`])) as {
    exports: { 'export-name': string; 'export-size': number }[];
  };
  expect(exports).toHaveLength(DISKS);
  expect(exports.every((one) => one['export-size'] === 2 ** 30)).toBe(true);
  const ours = await cliJson<{ name: string }[]>(['vdi', 'list', '--store', store]);
  expect(ours).toHaveLength(DISKS);
  expect((await daemon.stop()).code, daemon.log()).toBe(0);
});
