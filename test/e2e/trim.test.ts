/** Trims and zeroes of real clients: beside block status requests for the same range, and in objects that a snapshot shares. */
import { expect } from 'vitest';
import { cliJson, nbdsh, needs, ok, startDaemon } from '../harness/daemon.js';

const MIB = 2 ** 20;

async function shellOk(script: string): Promise<string> {
  const { code, signal, stdout, stderr } = await nbdsh(['-c', script]);
  if (code !== 0) throw new Error(`nbdsh: exit ${code ?? signal}\n${stdout}${stderr}`);
  return stdout;
}

needs('nbdsh')('block status of an object that another connection trims and writes is always answered', async () => {
  const daemon = await startDaemon({ args: ['--create', 'disk:16M'] });
  const script = `
import nbd
uri = ${JSON.stringify(daemon.uri('disk'))}
asker = nbd.NBD()
asker.add_meta_context("base:allocation")
asker.connect_uri(uri)
h.connect_uri(uri)
size = 4 * 1024 * 1024
part = size // 8
data = nbd.Buffer.from_bytearray(bytearray(b"x" * part))
mark = b"m" * 4096
asker.pwrite(mark, 2 * size)
failed = 0
for n in range(300):
    for k in range(8):
        at = ((n + k) % 8) * part
        h.aio_trim(part, at)
        h.aio_pwrite(data, (at + 3 * part) % size)
    if n % 10 == 0:
        h.aio_trim(size, 0)
    while h.aio_in_flight() > 0:
        found = []
        try:
            asker.block_status(3 * size, 0, lambda context, offset, entries, error: found.extend(entries))
        except nbd.Error as error:
            failed += 1
            print(error)
            h.poll(0)
            continue
        # All of it is told, up to the mark, and the mark is no hole.
        at = 0
        for length, flags in zip(found[::2], found[1::2]):
            assert length > 0, found
            if at <= 2 * size < at + length:
                assert flags == 0, found
            at += length
        while h.poll(0) > 0:
            pass
assert failed == 0, failed
print("done")
`;
  expect(await shellOk(script)).toContain('done');
  expect((await daemon.stop()).code, daemon.log()).toBe(0);
});

needs('nbdsh')('a trim of free space after a snapshot neither grows the store nor counts as changed', async () => {
  const daemon = await startDaemon({ args: ['--create', 'disk:256M'] });
  const { store } = daemon;
  const session = (body: string): Promise<string> =>
    shellOk(`
uri = ${JSON.stringify(daemon.uri('disk'))}
import nbd
object = 4 * 1024 * 1024
def changed():
    asker = nbd.NBD()
    asker.add_meta_context("sheepgate:changed:kept")
    asker.connect_uri(uri)
    found = []
    asker.block_status(asker.get_size(), 0, lambda context, offset, entries, error: found.extend(entries))
    asker.shutdown()
    return sum(length for length, flags in zip(found[::2], found[1::2]) if flags & 1)
h.connect_uri(uri)
${body}
h.flush()
h.shutdown()
`);
  const used = async (): Promise<number> => Number((await ok('du', ['-s', '-B1', store])).split('\t')[0]);
  // 32 objects are half used, and eight more are full of written zeros.
  await session(`
for n in range(32):
    h.pwrite(b"%c" % (n + 1) * (object // 2), n * object)
for n in range(32, 40):
    h.pwrite(bytes(object), n * object)
`);
  await cliJson(['vdi', 'snapshot', 'disk', 'kept'], { store });
  const before = await used();
  const trims = `
for n in range(32):
    h.trim(object // 2, n * object + object // 2)
    h.zero(object // 4, n * object + object // 2)
h.trim(object * 32, 32 * object)
h.zero(object // 2, object // 2, nbd.CMD_FLAG_FAST_ZERO)
print(changed())
`;
  expect((await session(trims)).trim()).toBe('0');
  expect((await used()) - before).toBeLessThan(MIB);
  // A trim of data other than zeros does count as changed.
  expect((await session(`h.trim(4096, 5 * object)\nprint(changed())`)).trim()).toBe('4096');
  expect((await daemon.stop()).code, daemon.log()).toBe(0);
});
