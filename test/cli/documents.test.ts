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
  const named = [...text.matchAll(/\bnpm run ([\w:-]+)/g)].map(([, name = '']) => name);
  expect(named).toContain('build');
  expect(named.filter((name) => !(name in scripts))).toEqual([]);
  const files = [...text.matchAll(/(?<![\w/])(?:bench|bin|nbd|src|test|tools)\/[\w./-]*\w/g)].map(([file]) => file);
  expect(files.filter((file) => !fs.existsSync(path.join(ROOT, file)))).toEqual([]);
  const settings = [...text.matchAll(/\bSHEEPGATE_\w+/g)].map(([name]) => name);
  const known = ['test/sheep', 'test/harness']
    .flatMap((folder) => fs.readdirSync(path.join(ROOT, folder)).map((name) => path.join(folder, name)))
    .filter((file) => file.endsWith('.ts'))
    .map(read)
    .join('\n');
  expect(settings.filter((name) => !known.includes(name))).toEqual([]);
});

/** Names of files and folders of the tree, by path and by base name. */
function namesInTree(): Set<string> {
  const names = new Set<string>();
  const visit = (folder: string): void => {
    for (const entry of fs.readdirSync(path.join(ROOT, folder), { withFileTypes: true })) {
      if (['node_modules', 'dist', '.git'].includes(entry.name)) continue;
      const name = path.join(folder, entry.name);
      names.add(name).add(entry.name);
      if (entry.isDirectory()) visit(name);
    }
  };
  visit('.');
  return names;
}

test('what docs/ARCHITECTURE.md names is there: paths, files, identifiers, and each function in its file', () => {
  const names = namesInTree();
  const text = read('docs/ARCHITECTURE.md');
  const quoted = [...text.matchAll(/`([^`\n]+)`/g)].map(([, each = '']) => each);
  const files = quoted.filter((each) =>
    /^[\w./-]+\.(?:ts|mjs|js|md)$|^(?:src|nbd|test|tools|docs|bench)\/[\w./-]*$/.test(each),
  );
  expect(files.length).toBeGreaterThan(100);
  expect(files.filter((file) => !names.has(file.replace(/\/$/, '')))).toEqual([]);

  const sources = [...names].filter((name) => name.endsWith('.ts') && name.includes('/')).map(read);
  sources.push(read('eslint.config.js'));
  const words = new Set(sources.flatMap((source) => source.match(/#?\w+/g) ?? []));
  const identifiers = quoted.filter((each) => /^#?\w+$/.test(each));
  expect(identifiers.length).toBeGreaterThan(80);
  expect(identifiers.filter((name) => !words.has(name))).toEqual([]);

  // As it is written there: a file, then ": " or " (", then functions with commas between.
  const paths = [...names].filter((name) => name.endsWith('.ts') && name.includes('/'));
  const places = [...text.matchAll(/`([\w./-]+\.ts)`(?:: | \()((?:`#?\w+`(?:, |\)|\b)?)+)/g)];
  expect(places.length).toBeGreaterThan(30);
  const lacking = places.flatMap(([, file = '', functions = '']) => {
    const candidates = paths.filter((each) => `/${each}`.endsWith(`/${file}`)).map(read);
    const wanted = [...functions.matchAll(/`(#?\w+)`/g)].map(([, name = '']) => name);
    const isIn = (source: string, name: string): boolean =>
      new RegExp(`(?<![\\w#.])${name}\\b\\s*[(:=<]|function ${name}\\b`).test(source);
    return wanted.filter((name) => !candidates.some((source) => isIn(source, name))).map((name) => `${file}: ${name}`);
  });
  expect(lacking).toEqual([]);
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
