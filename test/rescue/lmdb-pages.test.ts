/** Reading an LMDB file by its pages gives what LMDB gives, and finds each damaged page. */
import fs from 'node:fs';
import path from 'node:path';
import { open } from 'lmdb';
import { expect, test } from 'vitest';
import { databasesOf, pagesOfFile, readMeta, structureProblem } from '../../src/store/local/lmdb-pages.js';
import { hostDisk } from '../../src/system/real-disk.js';
import { memoryDirectory } from '../harness/daemon.js';

const PAGE = 4096;

async function made(): Promise<string> {
  const file = path.join(memoryDirectory(), 'some.mdb');
  const env = open<Buffer, string>({ path: file, noSubdir: true, encoding: 'binary', overlappingSync: false });
  const many = env.openDB<Buffer, [number, number]>({ name: 'many', encoding: 'binary' });
  const few = env.openDB<unknown, number>({ name: 'few', encoding: 'json' });
  await env.put('info', Buffer.from('1'));
  for (let round = 0; round < 3; round++) {
    await env.transaction(() => {
      for (let n = 0; n < 300; n++) void many.put([n, round], Buffer.alloc(n % 3 === 0 ? PAGE : 40, n + round));
      for (let n = 0; n < 500; n++) void few.put(n, { n, round });
    });
    await env.transaction(() => {
      for (let n = 0; n < 100; n++) void many.remove([n, round]);
    });
  }
  await env.close();
  return file;
}

test('the entries are those that LMDB has', async () => {
  const file = await made();
  const fd = fs.openSync(file, 'r');
  const { states, problem } = readMeta(hostDisk, fd);
  expect(problem).toBeUndefined();
  const [state] = states;
  if (!state) throw new Error('no state');
  const pages = pagesOfFile(hostDisk, fd, state.pageSize);
  expect(await structureProblem(pages, state)).toBeUndefined();
  const counts: Record<string, number> = {};
  let sum = 0;
  for (const { name, entries } of databasesOf(pages, state, (damage) => expect.fail(damage))) {
    for await (const { value } of entries()) {
      counts[name] = (counts[name] ?? 0) + 1;
      if (name === 'many') sum += value.length + (value[value.length - 1] ?? 0);
    }
  }
  expect(counts).toEqual({ '': 1, few: 500, many: 600 });
  const env = open<Buffer, string>({ path: file, noSubdir: true, encoding: 'binary' });
  let expected = 0;
  for (const { value } of env.openDB<Buffer, [number, number]>({ name: 'many', encoding: 'binary' }).getRange({}))
    expected += value.length + (value.at(-1) ?? 0);
  await env.close();
  expect(sum).toBe(expected);
  fs.closeSync(fd);
});

test('a page of zeros is found, unless nothing refers to it or it is the rest of a value', async () => {
  const file = await made();
  const whole = fs.readFileSync(file);
  let found = 0;
  for (let page = 0; page * PAGE < whole.length; page++) {
    const bytes = Buffer.from(whole);
    bytes.fill(0, page * PAGE, (page + 1) * PAGE);
    fs.writeFileSync(file, bytes);
    const fd = fs.openSync(file, 'r');
    const { states, problem } = readMeta(hostDisk, fd);
    const [state] = states;
    const damage = problem ?? (state && (await structureProblem(pagesOfFile(hostDisk, fd, state.pageSize), state)));
    fs.closeSync(fd);
    if (damage !== undefined) found++;
  }
  expect(found).toBeGreaterThan(100);
});
