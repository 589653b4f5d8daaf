/** Every export of index.ts is documented, and docs/api matches the docstrings. `vitest -u` writes the pages. */

import fs from 'node:fs';
import { fileURLToPath } from 'node:url';
import { beforeAll, expect, test } from 'vitest';
import { makeApiPages, type ApiPages } from './api-pages.js';

const DIRECTORY = fileURLToPath(new URL('../docs/api/', import.meta.url));

let made: ApiPages;

beforeAll(async () => {
  made = await makeApiPages();
});

test('every export of index.ts, and every public member of a class, has a docstring', () => {
  expect(made.exports.size).toBeGreaterThan(40);
  expect(made.unexplained).toEqual([]);
});

test('the pages of docs/api match the sources', async () => {
  for (const [name, text] of made.pages) await expect(text).toMatchFileSnapshot(DIRECTORY + name);
  expect(fs.readdirSync(DIRECTORY).sort()).toEqual([...made.pages.keys()].sort());
});

test('every export is on one of the pages', () => {
  for (const [name, page] of made.exports) {
    // The page of a function has its name with "()".
    const headings = page === `${name}.md` ? [`# ${name}`, `# ${name}()`] : [`## ${name}`];
    const lines = made.pages.get(page)?.split('\n') ?? [];
    expect(headings.some((heading) => lines.includes(heading))).toBe(true);
  }
});
