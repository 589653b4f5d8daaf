/** Makes the stores of attacks.mjs: one with a few disks of every kind, one with very many small disks. */
import path from 'node:path';

const MIB = 2 ** 20;
const GIB = 2 ** 30;
const TIB = 2 ** 40;
const OBJECT = 2 ** 22;
const PAGE = 4096;
/** Owners in the map of `full`; they have no files, because only maps are measured. */
const FIRST_OWNER = 100_000;
const OWNER_RUN_SHIFT = 5;
const OWNERS = 4000;

/** `kind`: few (data, empty with the snapshot s, holes, full, scratch, flushed-0 …) or many (data, and `vdis` empty ones). */
export async function prepare({ dist, store: location, kind, vdis }) {
  const { LocalStore } = await import(path.join(dist, 'store/local/local-store.js'));
  const { pagesOf } = await import(path.join(dist, 'store/local/map-pages.js'));
  const { VdiCatalog } = await import(path.join(dist, 'vdi/catalog.js'));
  const store = await LocalStore.open(location);
  const catalog = new VdiCatalog(store);
  const filled = async (name, size, fill) => {
    await catalog.create(name, size);
    const vdi = await catalog.openVdi(name);
    await fill(vdi);
    await vdi.flush();
    await catalog.release(vdi);
    return vdi;
  };
  await filled('data', 256 * MIB, async (vdi) => {
    const data = Buffer.alloc(OBJECT, 7);
    for (let at = 0; at < 256 * MIB; at += OBJECT) await vdi.write(at, data, false);
  });
  if (kind === 'many') {
    for (let index = 0; index < vdis; index++) await catalog.create(`vdi-${index}`, GIB);
  } else {
    await catalog.create('empty', 4 * TIB);
    await catalog.snapshot('empty', 's');
    await catalog.create('scratch', 64 * GIB);
    for (let index = 0; index < 8; index++) await catalog.create(`flushed-${index}`, GIB);
    await filled('holes', 256 * MIB, async (vdi) => {
      const page = Buffer.alloc(PAGE, 7);
      for (let at = 0; at < 256 * MIB; at += 2 * PAGE) await vdi.write(at, page, false);
    });
    const full = await filled('full', TIB, async () => undefined);
    const map = new Uint32Array(TIB / OBJECT);
    for (let idx = 0; idx < map.length; idx++) map[idx] = FIRST_OWNER + ((idx >>> OWNER_RUN_SHIFT) % OWNERS);
    await store.metadata.preparePages(pagesOf(full.record.vid, map));
  }
  await catalog.close();
}
