/**
 * Checks claims of header comments and documents about the whole tree: the imports of each layer, a header in every file,
 * readable lengths of files and lines, headings of documents. When a claim changes, change it here and in its text.
 */
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import ts from 'typescript';
import { describe, expect, test } from 'vitest';

const ROOT = path.resolve(import.meta.dirname, '../..');
/** A longer file has more than one idea. */
const MAX_FILE_LINES = 600;
/** Prettier limits code to 120 characters, and does not wrap comments and text. */
const MAX_LINE = 140;

/** Files of the working tree that git tracks or would track: no build output. */
function filesOf(...patterns: readonly string[]): string[] {
  const list = ['ls-files', '--cached', '--others', '--exclude-standard', '--deduplicate', '--', ...patterns];
  return execFileSync('git', list, { cwd: ROOT, encoding: 'utf8' })
    .split('\n')
    .filter((name) => name !== '' && fs.existsSync(path.join(ROOT, name)));
}

function textOf(name: string): string {
  return fs.readFileSync(path.join(ROOT, name), 'utf8');
}

const sources = filesOf('src/*.ts', 'nbd/src/*.ts');
const documents = filesOf('*.md');

/** The imports of a source as written there, types and `import()` included. */
function importsOf(name: string): string[] {
  const imports = /(?:\bfrom|\bimport\(|^import) ?'([^']+)'/gm;
  return Array.from(textOf(name).matchAll(imports), ([, module]) => module as string);
}

/** The folders of the files that import `module` or a part of it. */
function importersOf(module: string): string[] {
  const isIt = (each: string): boolean => each === module || each.startsWith(`${module}/`);
  const folders = sources.filter((name) => importsOf(name).some(isIt)).map((name) => path.posix.dirname(name));
  return [...new Set(folders)].sort();
}

/** Modules that reach the outside, and the folders that may import them, with the folders below those. */
const IMPORTERS: Readonly<Record<string, readonly string[]>> = {
  koffi: ['src/system'],
  lmdb: ['src/store/local'],
  'nbd-server-ts': ['src/cli', 'src/daemon', 'src/export', 'src/operations'],
  'node:child_process': ['src/jobs'],
  'node:worker_threads': ['nbd/src/server'],
  'node:fs': [
    'nbd/src/devices',
    'nbd/src/server',
    'src/cli',
    'src/daemon',
    'src/jobs',
    'src/operations',
    'src/store/sheep',
    'src/system',
  ],
  'node:net': ['nbd/src', 'src/daemon', 'src/jobs', 'src/operations', 'src/store/sheep', 'src/system'],
};

describe('imports', () => {
  test.each(Object.entries(IMPORTERS))('%s is imported in %j and nowhere else', (module, allowed) => {
    const importers = importersOf(module);
    expect(importers.length).toBeGreaterThan(0);
    const elsewhere = importers.filter((name) => !allowed.some((each) => `${name}/`.startsWith(`${each}/`)));
    expect(elsewhere).toEqual([]);
  });

  test('src/system imports Node, koffi, itself and src/text; src/text imports Node and itself', () => {
    const foreign = (layer: string, allowed: RegExp): string[] =>
      sources
        .filter((name) => name.startsWith(`src/${layer}/`))
        .flatMap((name) => importsOf(name).map((module) => `${name}: ${module}`))
        .filter((line) => !allowed.test(line.slice(line.indexOf(': ') + 2)));
    expect(foreign('system', /^(?:node:|koffi$|\.\/|\.\.\/text\/)/)).toEqual([]);
    expect(foreign('text', /^(?:node:|\.\/)/)).toEqual([]);
  });

  test('nbd/ imports only Node and itself', () => {
    const foreign = sources
      .filter((name) => name.startsWith('nbd/'))
      .flatMap((name) => importsOf(name).filter((module) => !/^(?:node:|\.\.?\/)/.test(module)));
    expect(foreign).toEqual([]);
  });
});

/** Where a source uses the keywords, but for constructors: parameters of constructors can be members, too. */
function privateMembersOf(name: string): string[] {
  const found: string[] = [];
  const source = ts.createSourceFile(name, textOf(name), ts.ScriptTarget.Latest);
  const visit = (node: ts.Node): void => {
    if (node.kind === ts.SyntaxKind.ProtectedKeyword) found.push(`${name}: protected`);
    if (ts.canHaveModifiers(node) && !ts.isConstructorDeclaration(node)) {
      for (const { kind } of ts.getModifiers(node) ?? [])
        if (kind === ts.SyntaxKind.PrivateKeyword) found.push(`${name}: ${node.getText(source).split('\n')[0]}`);
    }
    ts.forEachChild(node, visit);
  };
  visit(source);
  return found;
}

describe('a file of src/ or nbd/src/', () => {
  test('has # before private members; only constructors are `private`, and nothing is `protected`', () => {
    const withKeyword = sources.filter((name) => /\b(?:private|protected)\b/.test(textOf(name)));
    expect(withKeyword.length).toBeGreaterThan(0);
    expect(withKeyword.flatMap(privateMembersOf)).toEqual([]);
  });

  test('begins with a comment that says what it is for', () => {
    expect(sources.length).toBeGreaterThan(100);
    expect(sources.filter((name) => !/^(?:#!.*\n)?\/\*\*/.test(textOf(name)))).toEqual([]);
  });

  test(`has ${MAX_FILE_LINES} lines at most`, () => {
    const longer = sources.filter((name) => textOf(name).split('\n').length - 1 > MAX_FILE_LINES);
    expect(longer).toEqual([]);
  });
});

/** Lines of plain text: no tables, no indented or fenced blocks. */
function linesOfText(document: string): { readonly line: string; readonly number: number }[] {
  let isFenced = false;
  return textOf(document)
    .split('\n')
    .map((line, at) => ({ line, number: at + 1 }))
    .filter(({ line }) => {
      const isFence = /^\s*(?:```|~~~)/.test(line);
      if (isFence) isFenced = !isFenced;
      return !isFence && !isFenced && !/^(?:\||\t| {4})/.test(line);
    });
}

describe('lines', () => {
  test(`of comments have ${MAX_LINE} characters at most`, () => {
    const scripts = [...sources, ...filesOf('test/*.ts', 'nbd/test/*.ts', 'bench/*.mjs', 'tools/*.mjs')];
    const isLong = (line: string): boolean => line.length > MAX_LINE && /^\s*(?:\/\/|\/?\*)/.test(line);
    const longer = scripts.flatMap((name) =>
      textOf(name)
        .split('\n')
        .flatMap((line, at) => (isLong(line) ? [`${name}:${at + 1}`] : [])),
    );
    expect(longer).toEqual([]);
  });

  test(`of documents have ${MAX_LINE} characters at most, except in tables and code`, () => {
    expect(documents.length).toBeGreaterThan(10);
    const longer = documents.flatMap((name) =>
      linesOfText(name)
        .filter(({ line }) => line.length > MAX_LINE)
        .map(({ number }) => `${name}:${number}`),
    );
    expect(longer).toEqual([]);
  });
});

test('a document has one title, on its first line, and no heading leaves out a level', () => {
  const problems = documents.flatMap((name) => {
    const headings = linesOfText(name)
      .filter(({ line }) => /^#{1,6} /.test(line))
      .map(({ line, number }) => ({ number, level: line.indexOf(' ') }));
    const titles = headings.filter(({ level }) => level === 1);
    const first = /^# /.test(textOf(name)) && titles.length === 1 ? [] : [`${name}: ${titles.length} titles`];
    const skipped = headings.flatMap(({ level, number }, at) =>
      level > (headings[at - 1]?.level ?? 0) + 1 ? [`${name}:${number}`] : [],
    );
    return [...first, ...skipped];
  });
  expect(problems).toEqual([]);
});

/** Documents of other projects: the NBD protocol. */
const FOREIGN = new Set(['proto.md']);

test('the files that comments and documents name exist', () => {
  const all = filesOf();
  const names = new Set(all.map((name) => path.posix.basename(name)));
  const exists = (named: string): boolean =>
    named.includes('/') ? all.some((name) => `/${name}`.endsWith(`/${named}`)) : names.has(named);
  // Imports begin with a dot; the compiler checks them.
  const mention = /(?<=[\s(`'"])(?!\.)(?:[\w.-]+\/)*[\w-]+(?:\.test)?\.(?:ts|md)(?![\w/])/g;
  const missing = all
    .filter((name) => /\.(?:ts|md)$/.test(name))
    .flatMap((name) =>
      Array.from(textOf(name).matchAll(mention), ([named]) => named)
        .filter((named) => !FOREIGN.has(named) && !exists(named))
        .map((named) => `${name}: ${named}`),
    );
  expect(missing).toEqual([]);
});
