/**
 * The library by `import` and by `require` in one program, which packed.test.ts runs. Node gives both the same modules. With
 * `--no-experimental-require-module`, as in a bundle, `require` gives the copy in CommonJS: then the errors of one copy must
 * be errors to the other.
 *
 *     node two-copies.mjs one                                                 expects one copy
 *     node --no-experimental-require-module two-copies.mjs two                expects two
 */
import assert from 'node:assert/strict';
import { createRequire } from 'node:module';
import path from 'node:path';
import * as esm from 'nbd-server-ts';

const require = createRequire(import.meta.url);
const cjs = require('nbd-server-ts');
assert.deepEqual(Object.keys(cjs).sort(), Object.keys(esm).sort());
assert.equal(require('nbd-server-ts/client').NbdClientError, cjs.NbdClientError);
assert.equal(require('nbd-server-ts/block-device').DeviceError, cjs.DeviceError);
assert.equal(cjs.NbdServer === esm.NbdServer, process.argv[2] === 'one');

/** An error of one copy in a server of the other, and the client's error checked with the classes of both. */
async function failingDevice(server, device, name) {
  const geometry = { size: 4096 };
  const info = { name: '', description: '' };
  const read = () => {
    throw new device.DeviceError('ENOSPC', 'full');
  };
  const find = (exportName) => {
    if (exportName !== '') throw new device.ExportError('UNKNOWN', 'no such export');
    const unused = () => undefined;
    return { info, geometry, device: { geometry, read, write: unused, flush: unused, close: unused } };
  };
  const served = new server.NbdServer({ provider: { list: () => [], describe: find, open: find } });
  await served.listen({ path: path.resolve(name) });
  const client = await device.NbdClient.connect({ path: path.resolve(name) });
  const isOfBoth = (code) => (error) => {
    assert.equal(error.code, code);
    return error instanceof esm.NbdClientError && error instanceof cjs.NbdClientError;
  };
  await assert.rejects(client.go('absent'), isOfBoth('UNKNOWN_EXPORT'));
  await client.go('');
  await assert.rejects(client.read(0, 1), isOfBoth('ENOSPC'));
  await client.disconnect();
  await served.close();
}

await failingDevice(esm, cjs, 'a.sock');
await failingDevice(cjs, esm, 'b.sock');
for (const [one, other] of [
  [esm, cjs],
  [cjs, esm],
]) {
  assert(new one.DeviceError('EIO', 'broken') instanceof other.DeviceError);
  assert(new one.ExportError('UNKNOWN', 'unknown') instanceof other.ExportError);
  assert(!(new one.DeviceError('EIO', 'broken') instanceof other.ExportError));
  assert(!(new Error('another') instanceof other.DeviceError));
}
console.log('both');
