/** Documents: the targets of their links, and the commands that they name, exist. */
import fs from 'node:fs';
import path from 'node:path';
import { expect, test } from 'vitest';

const ROOT = path.resolve(import.meta.dirname, '../..');
const FOLDERS = ['.', 'docs', 'bench', 'examples/systemd', 'nbd', 'nbd/docs', 'src/store/local'];

const documents = FOLDERS.flatMap((folder) =>
  fs
    .readdirSync(path.join(ROOT, folder))
    .filter((name) => name.endsWith('.md'))
    .map((name) => path.join(folder, name)),
);
const read = (file: string): string => fs.readFileSync(path.join(ROOT, file), 'utf8');

/** The anchors of headings, as GitHub makes them. */
function anchorsOf(file: string): string[] {
  const headings = read(file).match(/^#+ .*$/gm) ?? [];
  return headings.map((heading) =>
    heading
      .replace(/^#+ /, '')
      .toLowerCase()
      .replaceAll(/[^\p{L}\p{N}\s_-]/gu, '')
      .replaceAll(' ', '-'),
  );
}

test('links between documents lead to existing files and headings', () => {
  const dead = documents.flatMap((file) =>
    [...read(file).matchAll(/\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)/g)].flatMap(([link, target = '', anchor]) => {
      const place = target === '' ? file : path.join(path.dirname(file), target);
      const isThere = fs.existsSync(path.join(ROOT, place));
      const isFound = isThere && (anchor === undefined || anchorsOf(place).includes(anchor));
      return isFound ? [] : [`${file}: ${link}`];
    }),
  );
  expect(dead).toEqual([]);
});

test('npm scripts, files and settings that CONTRIBUTING names exist', () => {
  const text = read('CONTRIBUTING.md');
  const { scripts } = JSON.parse(read('package.json')) as { scripts: Record<string, string> };
  const named = [...text.matchAll(/\bnpm run ([\w:]+)/g)].map(([, name = '']) => name);
  expect(named).toContain('build');
  expect(named.filter((name) => !(name in scripts))).toEqual([]);
  const files = [...text.matchAll(/\b(?:bench|bin|src|test|tools)\/[\w./-]*\w/g)].map(([file]) => file);
  expect(files.filter((file) => !fs.existsSync(path.join(ROOT, file)))).toEqual([]);
  const settings = [...text.matchAll(/\bSHEEPGATE_\w+/g)].map(([name]) => name);
  const tests = fs.readdirSync(path.join(ROOT, 'test/sheep')).filter((name) => name.endsWith('.ts'));
  const known = tests.map((name) => read(path.join('test/sheep', name))).join('\n');
  expect(settings.filter((name) => !known.includes(name))).toEqual([]);
});

test('the constants that docs/reference.md names are in the sources', () => {
  const limits = read('docs/reference.md').split('\n## Limits\n')[1]?.split('\n## ')[0] ?? '';
  const named = [...limits.matchAll(/^\|.*\|([^|]*)\|$/gm)].flatMap(([, cell = '']) =>
    [...cell.matchAll(/`(\w+)`/g)].map(([, name = '']) => name),
  );
  expect(named.length).toBeGreaterThan(40);
  const sources = ['src', 'nbd/src'].flatMap((folder) =>
    fs
      .readdirSync(path.join(ROOT, folder), { recursive: true, encoding: 'utf8' })
      .filter((name) => name.endsWith('.ts'))
      .map((name) => read(path.join(folder, name))),
  );
  const words = new Set(sources.flatMap((text) => text.match(/\w+/g) ?? []));
  expect(named.filter((name) => !words.has(name))).toEqual([]);
});
