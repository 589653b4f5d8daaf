/** Every export of the package is documented, and docs/api matches the docstrings. `vitest -u` writes the pages. */

import fs from 'node:fs';
import { fileURLToPath } from 'node:url';
import { beforeAll, expect, test } from 'vitest';
import { makeApiPages, type ApiPages } from './api-pages.js';

const DIRECTORY = fileURLToPath(new URL('../docs/api/', import.meta.url));

let made: ApiPages;

beforeAll(async () => {
  made = await makeApiPages();
});

test('every export of the package, and every public member of a class, has a docstring', () => {
  expect(made.exports.size).toBeGreaterThan(40);
  expect(made.unexplained).toEqual([]);
});

test('the pages of docs/api match the sources', async () => {
  for (const [name, text] of made.pages) await expect(text).toMatchFileSnapshot(DIRECTORY + name);
  expect(fs.readdirSync(DIRECTORY).sort()).toEqual([...made.pages.keys()].sort());
});

test('every export is on one of the pages', () => {
  for (const [name, page] of made.exports) {
    const heading = page === `${name}.md` ? '#' : '##';
    // A function's heading ends with ().
    expect(made.pages.get(page)).toMatch(new RegExp(`^${heading} ${name}(\\(\\))?$`, 'm'));
  }
});
