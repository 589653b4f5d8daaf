/**
 * Backup tools of other projects, which request allocated and changed blocks together: virtnbdbackup's own code, and the rules
 * of oVirt's imageio, written anew here. Also how libnbd shows answers with several contexts.
 */
import { NbdClient } from 'nbd-server-ts';
import { expect } from 'vitest';
import { ControlClient, pathOf } from '../../src/operations/control-client.js';
import { clientSet, virtnbdbackupOf } from '../harness/client-set.js';
import { cli, cliJson, needs, nbdsh, ok, startDaemon, waitUntil, type Daemon } from '../harness/daemon.js';

const KIB = 1024;
const MIB = 2 ** 20;
const BLOCK = 4 * KIB;
/** More blocks than one answer once had room for: virtnbdbackup then found 4,096 of 16,384 changed blocks. */
const BLOCKS = 16 * KIB;

let shared: Promise<Daemon> | undefined;

/** A disk with every second block of 4 KiB written since its snapshot "base". All tests share it: it takes long to remove. */
function fragmented(): Promise<Daemon> {
  return (shared ??= makeFragmented());
}

async function makeFragmented(): Promise<Daemon> {
  const daemon = await startDaemon({ args: ['--create', 'disk:256M'] });
  await cliJson(['vdi', 'snapshot', 'disk', 'base'], { store: daemon.store });
  await python(`
h.connect_uri(${JSON.stringify(daemon.uri('disk'))})
data = b'x' * ${BLOCK}
for n in range(${BLOCKS}):
    while h.aio_in_flight() >= 32:
        h.poll(-1)
    h.aio_pwrite(data, n * ${2 * BLOCK})
while h.aio_in_flight() > 0:
    h.poll(-1)
h.flush()
h.shutdown()`);
  return daemon;
}

/** The JSON that a script prints; `h` in the script is a handle that is not connected yet. */
async function python<T>(script: string, env: Record<string, string> = {}): Promise<T> {
  const result = await nbdsh(['-n', '-c', 'import json, nbd', '-c', 'h = nbd.NBD()', '-c', script], { env });
  expect(result.stderr).toBe('');
  expect(result.code).toBe(0);
  return (result.stdout === '' ? undefined : JSON.parse(result.stdout)) as T;
}

type Range = readonly [from: number, to: number];

/** Number of written blocks within the ranges. */
function blocksIn(ranges: readonly Range[]): number {
  let found = 0;
  for (const [from, to] of ranges) {
    for (let n = Math.ceil(from / (2 * BLOCK)); n < BLOCKS && n * 2 * BLOCK + BLOCK <= to; n++) found++;
  }
  return found;
}

needs('virtnbdbackup', 'nbdsh')(
  'virtnbdbackup finds every changed block of a fragmented disk, with the bitmap of the option or by its name',
  async (context) => {
    const daemon = await fragmented();
    const code = virtnbdbackupOf(clientSet) as string;
    // Its other dependencies (libvirt, ssh, progress bars) are not needed to read extents.
    const script = (name: string): string => `
import importlib.util, inspect, os, sys, types
from unittest.mock import MagicMock
sys.path.insert(0, ${JSON.stringify(code)})
for name in ['libvirt', 'lxml', 'lz4', 'paramiko', 'tqdm', 'colorlog', 'scp']:
    if importlib.util.find_spec(name) is None:
        sys.modules[name] = MagicMock()
        for part in ['etree', 'frame', 'contrib', 'contrib.logging', 'ssh_exception']:
            sys.modules[name + '.' + part] = MagicMock()
import libvirtnbdbackup
from libvirtnbdbackup.nbdcli.client import client
from libvirtnbdbackup.extenthandler import ExtentHandler
where = types.SimpleNamespace(exportName=${JSON.stringify(name)}, metaContext='qemu:dirty-bitmap:base', tls=False,
    backupSocket=${JSON.stringify(daemon.socket)}, uri=${JSON.stringify(daemon.uri(name))})
# Releases since 2 have one argument more: whether to leave out base:allocation.
knows_holes = len(inspect.signature(ExtentHandler.__init__).parameters) > 3
more = [False] if knows_holes else []
stdout, sys.stdout = sys.stdout, open(os.devnull, 'w')
extents = ExtentHandler(client(where, *more).connect(), where, *more).queryBlockStatus()
sys.stdout = stdout
print(json.dumps(dict(version=libvirtnbdbackup.__version__, knowsHoles=knows_holes,
    ranges=[[e.offset, e.offset + e.length] for e in extents if e.data])))`;
    for (const name of ['disk', 'disk@now', 'disk@now/since=base']) {
      const found = await python<{ version: string; knowsHoles: boolean; ranges: Range[] }>(script(name));
      context.task.meta.versions = { virtnbdbackup: found.version };
      expect(blocksIn(found.ranges), name).toBe(BLOCKS);
      const bytes = found.ranges.reduce((sum, [from, to]) => sum + to - from, 0);
      expect(bytes, name).toBe(found.knowsHoles ? BLOCKS * BLOCK : 2 * BLOCKS * BLOCK);
    }
  },
);

needs('nbdsh')('imageio finds exactly one dirty bitmap with since=TAG, and merges it with the allocation', async () => {
  const daemon = await fragmented();
  const { store } = daemon;
  await cliJson(['vdi', 'snapshot', 'disk', 'later'], { store });
  // Its rules, of ovirt_imageio/_internal: it lists "qemu:dirty-bitmap:" and takes the one bitmap that comes, asks for it
  // together with base:allocation and qemu:allocation-depth, takes no context that it has not asked for, and lays the
  // extents of one answer over each other until the first of the two lists ends.
  const find = (name: string): string => `
bitmaps, contexts = [], []
h.set_opt_mode(True)
h.connect_unix(${JSON.stringify(daemon.socket)})
h.set_export_name(${JSON.stringify(name)})
h.add_meta_context('qemu:dirty-bitmap:')
h.opt_list_meta_context(lambda name: bitmaps.append(name))
h.clear_meta_contexts()`;
  const dirty = (name: string): string => `${find(name)}
assert len(bitmaps) == 1, bitmaps
for context in ['base:allocation', 'qemu:allocation-depth', bitmaps[0]]:
    h.add_meta_context(context)
h.opt_go()
ranges, at, size = [], 0, h.get_size()
while at < size:
    answer = {}
    h.block_status(min(size - at, 1 << 31), at, lambda context, offset, entries, error: answer.update({context: entries}))
    assert set(answer) == {'base:allocation', bitmaps[0]}, answer
    a, b = [[list(pair) for pair in zip(entries[::2], entries[1::2])][::-1] for entries in (answer['base:allocation'], answer[bitmaps[0]])]
    assert sum(length for length, _ in a) == sum(length for length, _ in b)
    while a and b:
        length = min(a[-1][0], b[-1][0])
        if b[-1][1] & 1 and not a[-1][1] & 2:
            ranges.append([at, at + length])
        at += length
        for extents in (a, b):
            extents[-1][0] -= length
            if extents[-1][0] == 0:
                extents.pop()
print(json.dumps([bitmaps, ranges]))`;
  for (const name of ['disk/since=base', 'disk@now/since=base', 'disk@later/since=base']) {
    const [bitmaps, ranges] = await python<[string[], Range[]]>(dirty(name));
    expect(bitmaps).toEqual(['qemu:dirty-bitmap:base']);
    expect(blocksIn(ranges), name).toBe(BLOCKS);
  }
  const [, none] = await python<[string[], Range[]]>(dirty('disk@now/since=later'));
  expect(none).toEqual([]);
  // Without the option there is one context per snapshot: clients choose by name.
  const all = await python<string[]>(`${find('disk@now')}\nprint(json.dumps(bitmaps))`);
  expect(all).toEqual(['qemu:dirty-bitmap:later', 'qemu:dirty-bitmap:base']);

  // An export that cannot be opened says why, and a base is kept as long as a client compares with it.
  for (const [name, words] of [
    ['disk@now/since=nothing', 'has no snapshot "nothing"'],
    ['disk/since=now', 'needs a permanent snapshot'],
    ['disk/alone', '"alone" after the slash is not an option; there are since=TAG'],
  ] as const) {
    const refused = await nbdsh(['-u', daemon.uri(name), '-c', 'pass']);
    expect(refused.code, name).not.toBe(0);
    const told = await cli(['export', name, '-'], { store });
    expect(told.stderr, name).toContain(words);
  }
  const holder = await NbdClient.connect({ path: daemon.socket });
  await holder.go('disk@now/since=base');
  const remove = (): Promise<{ code: number | null; stderr: string }> => cli(['vdi', 'delete', 'disk@base'], { store });
  expect((await remove()).stderr).toContain('disk@base is open by 1 connection');
  await holder.disconnect();
  await waitUntil(async () => (await remove()).code === 0, "the snapshot is nobody's base any more");
  expect((await daemon.stop()).code, daemon.log()).toBe(0);
});

needs('nbdinfo', 'nbdsh')(
  'of more than 256 snapshots the newest are listed, and each one can be selected by its name',
  async () => {
    const daemon = await startDaemon({ args: ['--create', 'disk:64M'] });
    const control = new ControlClient(daemon.control);
    for (let n = 0; n < 260; n++)
      await control.call('POST', pathOf('vdis', 'disk', 'snapshots'), { body: { tag: `t${n}` } });
    const listed = await python<string[]>(`
found = []
h.set_opt_mode(True)
h.connect_unix(${JSON.stringify(daemon.socket)})
h.set_export_name('disk')
h.opt_list_meta_context(lambda name: found.append(name))
print(json.dumps(found))`);
    expect(listed).toHaveLength(1 + 2 * 256);
    expect(listed).toContain('sheepgate:changed:t4');
    expect(listed).not.toContain('sheepgate:changed:t3');
    for (const context of ['sheepgate:changed:t0', 'qemu:dirty-bitmap:t0', 'qemu:dirty-bitmap:t259']) {
      const map = JSON.parse(await ok('nbdinfo', ['--json', `--map=${context}`, daemon.uri('disk')])) as object[];
      expect(map, context).toMatchObject([{ offset: 0, length: 64 * MIB, type: 0 }]);
    }
    const one = JSON.parse(
      await ok('nbdinfo', ['--json', '--map=qemu:dirty-bitmap:t1', daemon.uri('disk/since=t1')]),
    ) as object[];
    expect(one).toMatchObject([{ offset: 0, length: 64 * MIB, type: 0 }]);
    expect((await daemon.stop()).code, daemon.log()).toBe(0);
  },
);
