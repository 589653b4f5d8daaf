/** Imports in src/: no cycles, and src/sheepdog imports no store. eslint.config.js has the layers. */
import fs from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { expect, test } from 'vitest';

const SOURCES = fileURLToPath(new URL('../../src/', import.meta.url));
const IMPORT = /^(?:import|export)\b[^;]*?\bfrom '(\.[^']+)'/gm;

/** The static imports of each file from src/, types included, as paths from there. */
function readImports(): Map<string, string[]> {
  const files = fs
    .readdirSync(SOURCES, { recursive: true, encoding: 'utf8' })
    .filter((name) => name.endsWith('.ts') && !name.endsWith('.d.ts'));
  return new Map(
    files.map((file) => {
      const text = fs.readFileSync(path.join(SOURCES, file), 'utf8');
      const named = Array.from(text.matchAll(IMPORT), ([, name]) => name as string);
      return [file, named.map((name) => path.join(path.dirname(file), name).replace(/\.js$/, '.ts'))];
    }),
  );
}

const imports = readImports();

/** Each group of files that import each other, directly or not (Tarjan's strongly connected components). */
function findCycles(): string[] {
  const indexes = new Map<string, number>();
  const stack: string[] = [];
  const cycles: string[] = [];
  const visit = (file: string): number => {
    const index = indexes.size;
    let low = index;
    indexes.set(file, index);
    stack.push(file);
    for (const other of imports.get(file) ?? []) {
      const known = indexes.get(other);
      if (known === undefined) low = Math.min(low, visit(other));
      else if (stack.includes(other)) low = Math.min(low, known);
    }
    if (low === index) {
      const group = stack.splice(stack.indexOf(file));
      if (group.length > 1 || (imports.get(file) ?? []).includes(file)) cycles.push(group.sort().join(', '));
    }
    return low;
  };
  for (const file of imports.keys()) if (!indexes.has(file)) visit(file);
  return cycles;
}

test('no files of src/ import each other in a cycle, types included', () => {
  expect(imports.size).toBeGreaterThan(200);
  expect(findCycles()).toEqual([]);
});

test('src/sheepdog imports only src/text, so that it can be used without a store', () => {
  const others: string[] = [];
  for (const [file, imported] of imports) {
    if (!file.startsWith('sheepdog/')) continue;
    for (const other of imported) {
      if (!other.startsWith('sheepdog/') && !other.startsWith('text/')) others.push(`${file} imports ${other}`);
    }
  }
  expect(others).toEqual([]);
});
