/** Blocks that differ from a snapshot, queried by real clients through meta contexts. */
import { expect } from 'vitest';
import { cli, cliJson, needs, run, startDaemon } from '../harness/daemon.js';

const MIB = 2 ** 20;
/** In MiB. */
const BLOCK = 4096 / MIB;
interface MapEntry {
  readonly offset: number;
  readonly length: number;
  readonly type: number;
}

needs(
  'nbdinfo',
  'qemu-io',
  'qemu-img',
)(
  'sheepgate:changed:TAG and the dirty bitmap report which blocks were written or trimmed since a snapshot',
  async () => {
    const daemon = await startDaemon({ args: ['--create', 'disk:64M'] });
    const { store } = daemon;
    const io = async (...commands: string[]): Promise<void> => {
      const result = await run('qemu-io', ['-f', 'raw', ...commands.flatMap((c) => ['-c', c]), daemon.uri('disk')]);
      expect(result.code, result.stderr).toBe(0);
    };
    const changed = async (name: string, context: string): Promise<[number, number][]> => {
      const result = await run('nbdinfo', ['--json', `--map=${context}`, daemon.uri(name)]);
      expect(result.code, result.stderr).toBe(0);
      const map = JSON.parse(result.stdout) as MapEntry[];
      expect(map.reduce((sum, { length }) => sum + length, 0)).toBe(64 * MIB);
      return map.filter(({ type }) => type === 1).map(({ offset, length }) => [offset / MIB, length / MIB]);
    };
    await io('write 0 24M', 'flush');
    await cliJson(['vdi', 'snapshot', 'disk', 'one'], { store });
    expect(await changed('disk', 'sheepgate:changed:one')).toEqual([]);
    await io('write 5M 512', 'discard 12M 4M', 'write 40M 9M', 'flush');
    // To the block where a part of an object was written that was there before.
    const since = [
      [5, BLOCK],
      [12, 4],
      [40, 12],
    ];
    expect(await changed('disk', 'sheepgate:changed:one')).toEqual(since);
    expect(await changed('disk', 'qemu:dirty-bitmap:one')).toEqual(since);
    expect(await changed('disk@now', 'sheepgate:changed:one')).toEqual(since);

    await cliJson(['vdi', 'snapshot', 'disk', 'two'], { store });
    await io('write 0 512', 'flush');
    expect(await changed('disk', 'sheepgate:changed:two')).toEqual([[0, BLOCK]]);
    expect(await changed('disk', 'sheepgate:changed:one')).toEqual([[0, BLOCK], ...since]);
    expect(await changed('disk@two', 'sheepgate:changed:one')).toEqual(since);

    // qemu's own client, which shows dirty blocks as "not data"
    const options = `driver=nbd,server.type=unix,server.path=${daemon.socket},export=disk,x-dirty-bitmap=qemu:dirty-bitmap:one`;
    const map = await run('qemu-img', ['map', '--output=json', '--image-opts', options]);
    expect(map.code, map.stderr).toBe(0);
    const dirty = (JSON.parse(map.stdout) as { start: number; length: number; data: boolean }[])
      .filter(({ data }) => !data)
      .map(({ start, length }) => [start / MIB, length / MIB]);
    expect(dirty).toEqual([[0, BLOCK], ...since]);

    // a snapshot that no client compares with any more can be deleted
    expect((await cli(['vdi', 'delete', 'disk@one'], { store })).stderr).toBe('');
    expect((await run('nbdinfo', ['--map=sheepgate:changed:one', daemon.uri('disk')])).code).not.toBe(0);
    expect((await daemon.stop()).code, daemon.log()).toBe(0);
  },
);
