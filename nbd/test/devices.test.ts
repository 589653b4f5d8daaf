/** The devices in memory and in files against the conformance suite of devices. */

import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { fileDevice } from '../src/devices/file.js';
import { memoryDevice } from '../src/devices/memory.js';
import { deviceSuite, testContent } from './device-suite.js';
import { fileCalls } from './file-calls.js';
import { temporaryDirectory } from './test-server.js';

const content = testContent();

deviceSuite('memory, sparse', () => {
  const device = memoryDevice(content.length);
  void device.write(0, content, false);
  return { device, content };
});

deviceSuite('memory over bytes', () => ({ device: memoryDevice(Uint8Array.from(content)), content }));

async function fileOf(bytes: Buffer): Promise<string> {
  const path = join(await temporaryDirectory(), 'disk');
  await writeFile(path, bytes);
  return path;
}

deviceSuite('a file', async () => ({ device: await fileDevice(await fileOf(content)), content }), { runs: 6 });

deviceSuite(
  'a file, read-only',
  async () => ({ device: await fileDevice(await fileOf(content), { readOnly: true }), content }),
  { runs: 3 },
);

deviceSuite(
  'a file with calls of the system',
  async () => ({ device: await fileDevice(await fileOf(content), { calls: fileCalls }), content }),
  { runs: 10 },
);
