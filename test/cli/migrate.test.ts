/**
 * `sheepgate migrate` between two stores: what it copies and what not, which VDIs it does not touch, and its messages when the
 * two sides differ. Clusters are in test/sheep/migrate.test.ts.
 */
import { createHash } from 'node:crypto';
import fs from 'node:fs';
import path from 'node:path';
import { expect, test } from 'vitest';
import { cli, startDaemon } from '../harness/daemon.js';
import { attach, expectBytes, MIB, oneLineOf, patterned } from './both-ways.js';
import {
  checkContents,
  localPlace,
  makeHistory,
  migrate,
  refused,
  trim,
  withCatalog,
  write,
  type Place,
} from './migration-stores.js';

test('an existing VDI of that name, made by another command, is not touched', async () => {
  const local = localPlace();
  const there = localPlace();
  const contents = await makeHistory(local, 'vm');
  const own = Buffer.alloc(2 * MIB);
  await withCatalog(there, async (catalog) => {
    await catalog.create('vm', 2 * MIB, { blockSizeShift: 20 });
    await write(catalog, 'vm', own, 0, patterned(MIB, 7));
  });
  expect(await refused(local, there)).toMatch(/vm in \S* exists, .*nothing was touched; .*--as/);
  await checkContents(there, 'vm', new Map([['', own]]));
  // Nor one that another migration has begun.
  const other = localPlace();
  await withCatalog(other, async (catalog) => {
    await catalog.create('vm', MIB);
    await catalog.snapshot('vm', 'mine');
  });
  await migrate(other, there, '--as', 'half', '--sync');
  expect(await refused(local, there, '--as', 'half')).toMatch(/unfinished target of another migration/);
  // Nor one that another migration has finished.
  await migrate(local, there, '--as', 'done');
  expect(await refused(local, there, '--as', 'done')).toMatch(/exists/);
  await checkContents(there, 'done', contents);
});

test('writes of another client to the target between two runs are not undone', async () => {
  const local = localPlace();
  const there = localPlace();
  const content = Buffer.alloc(2 * MIB);
  await withCatalog(local, async (catalog) => {
    await catalog.create('vm', 2 * MIB);
    await write(catalog, 'vm', content, 0, patterned(MIB, 1));
  });
  await migrate(local, there, '--sync');
  await withCatalog(there, (catalog) => write(catalog, 'vm', content, MIB, patterned(512, 2)));
  expect(await refused(local, there)).toMatch(/was written by another client since the last run.*delete vm@migrated-/);
  await withCatalog(there, async (catalog) => {
    const vdi = await catalog.openVdi('vm');
    const found = Buffer.alloc(vdi.size);
    await vdi.read(0, found);
    await catalog.release(vdi);
    expectBytes(found, content);
  });
});

test('of a deleted disk, the snapshots are migrated', async () => {
  const local = localPlace();
  const there = localPlace();
  const contents = await makeHistory(local, 'vm');
  await withCatalog(local, (catalog) => catalog.remove('vm'));
  contents.delete('');
  const result = await migrate(local, there);
  expect(result).toMatchObject({ working: null, isFinished: true });
  await checkContents(there, 'vm', contents);
});

test('holes stay holes, and unchanged data is neither copied nor compared again', async () => {
  const local = localPlace();
  const there = localPlace();
  await withCatalog(local, async (catalog) => {
    await catalog.create('vm', 2 ** 40);
    const vdi = await catalog.openVdi('vm');
    await vdi.write(2 ** 39, patterned(MIB, 1), false);
    await vdi.write(2 ** 40 - MIB, Buffer.alloc(MIB), false);
    await vdi.flush();
    await catalog.snapshot('vm', 'a');
    await vdi.write(0, patterned(4096, 2), false);
    await catalog.release(vdi);
  });
  const result = await migrate(local, there);
  expect(result.snapshots[0]).toMatchObject({ copiedBytes: MIB, comparedBytes: 8 * MIB });
  expect(result.working).toMatchObject({ copiedBytes: 4096, comparedBytes: 4 * MIB });
  await withCatalog(there, async (catalog) => {
    expect(await catalog.show('vm')).toMatchObject({ allocatedBytes: 8 * MIB, size: 2 ** 40 });
  });
});

/** The tree hash, as documented in docs/backup.md. */
function hashOf(content: Buffer, blockBytes: number): string {
  const hash = createHash('sha256');
  const zeros = Buffer.alloc(blockBytes);
  for (let at = 0; at < content.length; at += blockBytes) {
    const block = content.subarray(at, at + blockBytes);
    const isZero = block.equals(zeros.subarray(0, block.length));
    hash.update(isZero ? Buffer.alloc(32) : createHash('sha256').update(block).digest());
  }
  return hash.digest('hex');
}

test('the hash of every snapshot is as documented, for each base that it is compared with', async () => {
  const local = localPlace();
  const there = localPlace();
  const contents = await makeHistory(local, 'vm');
  const result = await migrate(local, there);
  const steps = [...result.snapshots, result.working].map((step) => [step?.tag ?? '', step?.treeHash]);
  const blockBytes = result.working?.treeBlockBytes as number;
  expect(steps).toEqual([...contents].map(([tag, content]) => [tag, hashOf(content, blockBytes)]));
  await checkContents(there, 'vm', contents);
});

test('ranges that were trimmed since the previous snapshot are trimmed in the target, and use no space', async () => {
  const local = localPlace();
  const there = localPlace();
  const contents = new Map<string, Buffer>();
  await withCatalog(local, async (catalog) => {
    await catalog.create('vm', 8 * MIB, { blockSizeShift: 20 });
    const content = Buffer.alloc(8 * MIB);
    await write(catalog, 'vm', content, 0, patterned(8 * MIB, 1));
    await catalog.snapshot('vm', 'full');
    contents.set('full', Buffer.from(content));
    await trim(catalog, 'vm', content, 2 * MIB, 4 * MIB);
    // Not a whole object, and overwritten with zeros.
    await trim(catalog, 'vm', content, MIB / 2, MIB / 4);
    await write(catalog, 'vm', content, 7 * MIB, Buffer.alloc(MIB));
    contents.set('', content);
  });
  const { working } = await migrate(local, there);
  expect(working).toMatchObject({ copiedBytes: 0, zeroedBytes: 5.25 * MIB });
  await checkContents(there, 'vm', contents);
  await withCatalog(there, async (catalog) => {
    expect(await catalog.show('vm')).toMatchObject({ allocatedBytes: 3 * MIB });
  });
});

/** Change a byte of the object of snapshot `tag` that holds `at`, behind the store's back. */
async function damage(place: Place, tag: string, at: number): Promise<void> {
  const { vid, blockSizeShift } = await withCatalog(place, (catalog) => catalog.find(`vm@${tag}`));
  const idx = Math.floor(at / 2 ** blockSizeShift);
  const name = vid.toString(16).padStart(8, '0') + idx.toString(16).padStart(8, '0');
  const folder = (((idx >> 8) ^ vid) & 255).toString(16).padStart(2, '0');
  const fd = fs.openSync(path.join(place.argument, 'objects', folder, name), 'r+');
  const byte = Buffer.alloc(1);
  const within = at % 2 ** blockSizeShift;
  fs.readSync(fd, byte, 0, 1, within);
  byte[0] = (byte[0] as number) ^ 0xff;
  fs.writeSync(fd, byte, 0, 1, within);
  fs.closeSync(fd);
}

test('a damaged copy is found, its place is named, and the remedy in the message works', async () => {
  const local = localPlace();
  const there = localPlace();
  const contents = new Map<string, Buffer>();
  await withCatalog(local, async (catalog) => {
    await catalog.create('vm', 8 * MIB, { blockSizeShift: 20 });
    const content = Buffer.alloc(8 * MIB);
    for (const tag of ['good', 'bad', '']) {
      await write(catalog, 'vm', content, tag === 'good' ? 0 : 2 * MIB, patterned(3 * MIB, tag.length + 1));
      if (tag !== '') await catalog.snapshot('vm', tag);
      contents.set(tag, Buffer.from(content));
    }
  });
  await migrate(local, there, '--sync');
  await damage(there, 'bad', 2.25 * MIB + 5000);
  const from = 2.25 * MIB + 4096;
  const expected = new RegExp(
    `vm@bad in .* is not the same as vm@bad in .*: bytes ${from} to ${from + 4095}; .*delete it and the snapshots after it`,
  );
  expect(await refused(local, there, '--verify', 'only')).toMatch(expected);
  expect(await refused(local, there)).toMatch(expected);
  // A run that does not compare again does not find it.
  await migrate(local, there, '--sync', '--verify', 'changed');
  await withCatalog(there, (catalog) => catalog.remove('vm@bad'));
  const result = await migrate(local, there);
  expect(result.snapshots.map(({ copiedBytes }) => copiedBytes > 0)).toEqual([false, true]);
  await checkContents(there, 'vm', contents);
});

test('a missing VDI, identical source and target, and wrong usage are reported in one line', async () => {
  const local = localPlace();
  const there = localPlace();
  await withCatalog(local, (catalog) => catalog.create('other', MIB));
  expect(await refused(there, local)).toMatch(/no store in/);
  expect(await refused(local, there)).toMatch(/no VDI named "vm" in .*'sheepgate vdi list'/);
  const usage = async (...args: string[]): Promise<string> =>
    oneLineOf(await cli(['migrate', ...args]), 2, args.join(' '));
  expect(await usage('other', '--from', local.argument, '--to', `${local.argument}/.`)).toMatch(/are the same/);
  fs.symlinkSync(local.argument, `${local.argument}-too`);
  expect(await usage('other', '--from', local.argument, '--to', `${local.argument}-too`)).toMatch(/are the same/);
  expect(await usage('vm', '--from', local.argument)).toMatch(/required option '--to <place>' not specified/);
  expect(await usage('vm', '--from', 'cluster:', '--to', 'x')).toMatch(/"" is no HOST or HOST:PORT/);
  expect(await usage('vm', '--from', 'cluster:a:0', '--to', 'x')).toMatch(/0 is no port/);
  expect(await usage('vm', '--from', '', '--to', 'x')).toMatch(/Give a store directory, or cluster:HOST/);
  expect(await usage('vm', '--from', 'x', '--to', 'y', '--verify', 'none')).toMatch(
    /Allowed choices are all, changed, only/,
  );
  expect(await usage('vm', '--from', 'x', '--to', 'y', '--verify', 'only', '--sync')).toMatch(/leave out one of them/);
  const zeros = ['other', '--from', local.argument, '--to', there.argument, '--missing', 'zero'];
  expect(await usage(...zeros)).toMatch(/--missing=zero is for clusters.* is a local store/);
});

test('a target that is open is refused, and so is a source that is itself an unfinished target', async () => {
  const local = localPlace();
  await withCatalog(local, (catalog) => catalog.create('vm', MIB));
  const daemon = await startDaemon();
  const there = { ...localPlace(), argument: daemon.store };
  await migrate(local, there, '--sync');
  const client = await attach(daemon, 'vm');
  expect(await refused(local, there)).toMatch(
    /vm is open by 1 connection and cannot be overwritten now; disconnect first: process /,
  );
  await client.disconnect();
  expect(await refused(there, localPlace())).toMatch(/itself the unfinished target of a migration/);
  expect((await daemon.stop()).code).toBe(0);
});

test('a VDI of an unfinished import is neither continued as a target nor accepted as a source', async () => {
  const local = localPlace();
  const there = localPlace();
  await makeHistory(local, 'vm');
  await withCatalog(there, (catalog) =>
    catalog.begin('vm', { by: 'import', of: '', run: 'aa', size: 9 * MIB, overwrites: false, goesOn: false }),
  );
  expect(await refused(local, there)).toMatch(
    /vm in .* is unfinished, left by another migration or command \(import\)/,
  );
  expect(await refused(there, localPlace())).toMatch(/vm is unfinished: an import that began/);
  // Nor a VDI that an import began to overwrite between two runs.
  const between = localPlace();
  await migrate(local, between, '--sync');
  await withCatalog(between, (catalog) =>
    catalog.begin('vm', { by: 'import', of: '', run: 'aa', size: 9 * MIB, overwrites: true, goesOn: false }),
  );
  expect(await refused(local, between)).toMatch(/is unfinished, left by another migration or command \(import\)/);
  await withCatalog(between, async (catalog) => {
    await expect(catalog.openVdi('vm')).rejects.toMatchObject({ code: 'UNFINISHED' });
  });
  expect(await refused(local, there, '--verify', 'only')).toMatch(/vm is unfinished: an import that began/);
});

test('an empty VDI of the same name and size is used as the target: no data is lost', async () => {
  const local = localPlace();
  const there = localPlace();
  const contents = await makeHistory(local, 'vm');
  await withCatalog(there, (catalog) => catalog.create('vm', 9 * MIB + 512, { blockSizeShift: 20 }));
  await migrate(local, there);
  await checkContents(there, 'vm', contents);
});
