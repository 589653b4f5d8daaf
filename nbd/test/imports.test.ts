/** Imports in the library: no cycles, shared code imports neither server nor client, and these do not import each other. */

import fs from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { expect, test } from 'vitest';

const SOURCES = fileURLToPath(new URL('../src/', import.meta.url));

/** The folder of a file; for files outside of folders their own names. */
const FOLDER = /^[^/]+/;
const MAY_IMPORT: Readonly<Record<string, readonly string[]>> = {
  'brand.ts': [],
  'block-device.ts': ['protocol', 'brand.ts'],
  'transferred.ts': [],
  'promised.ts': [],
  'loop-slices.ts': [],
  'kinds.ts': [],
  'device.ts': ['block-device.ts', 'loop-slices.ts', 'promised.ts', 'transferred.ts'],
  protocol: ['protocol', 'block-device.ts', 'kinds.ts'],
  server: [
    ...[
      'server',
      'protocol',
      'block-device.ts',
      'brand.ts',
      'device.ts',
      'kinds.ts',
      'loop-slices.ts',
      'promised.ts',
      'transferred.ts',
    ],
  ],
  client: ['client', 'protocol', 'block-device.ts', 'brand.ts', 'device.ts', 'kinds.ts', 'transferred.ts'],
  'on-abort.ts': [],
  'page-table.ts': [],
  devices: ['devices', 'block-device.ts', 'device.ts', 'on-abort.ts', 'page-table.ts'],
  filters: ['filters', 'block-device.ts', 'device.ts', 'on-abort.ts', 'page-table.ts', 'transferred.ts'],
  'checked-device.ts': ['block-device.ts', 'device.ts', 'kinds.ts', 'server'],
  'device-handle.ts': ['block-device.ts', 'device.ts'],
  'shared.ts': ['server', 'block-device.ts', 'device.ts', 'device-handle.ts', 'checked-device.ts'],
  'serve.ts': [
    'server',
    'protocol',
    'block-device.ts',
    'device.ts',
    'device-handle.ts',
    'checked-device.ts',
    'kinds.ts',
  ],
  'create-server.ts': ['server', 'block-device.ts', 'device.ts', 'checked-device.ts', 'kinds.ts'],
  'index.ts': [
    ...['server', 'client', 'protocol', 'block-device.ts', 'device.ts'],
    ...['shared.ts', 'serve.ts', 'create-server.ts'],
  ],
};
/** Imports from outside the library: Node's modules only. */
const OUTSIDE = /^node:/;

/** The imports of each file, types included, as paths from src/. */
function readImports(): Map<string, string[]> {
  const files = fs.readdirSync(SOURCES, { recursive: true, encoding: 'utf8' }).filter((name) => name.endsWith('.ts'));
  return new Map(
    files.map((file) => {
      const text = fs.readFileSync(path.join(SOURCES, file), 'utf8');
      const named = Array.from(text.matchAll(/^(?:import|export)\b[^;]*?\bfrom '([^']+)'/gm), ([, name]) => name ?? '');
      return [file, named.map((name) => (name.startsWith('.') ? sourceOf(file, name) : name))];
    }),
  );
}

function sourceOf(importer: string, name: string): string {
  return path.join(path.dirname(importer), name).replace(/\.js$/, '.ts');
}

const imports = readImports();
const folderOf = (file: string): string => FOLDER.exec(file)?.[0] ?? file;

test('each folder imports only its allowed folders and Node', () => {
  const wrong: string[] = [];
  for (const [file, imported] of imports) {
    for (const other of imported) {
      const isOurs = imports.has(other);
      const isAllowed = isOurs ? MAY_IMPORT[folderOf(file)]?.includes(folderOf(other)) : OUTSIDE.test(other);
      if (isAllowed !== true) wrong.push(`${file} imports ${other}`);
    }
  }
  expect(imports.size).toBeGreaterThan(30);
  expect(wrong).toEqual([]);
});

test('imports have no cycles, types included', () => {
  const cycles: string[] = [];
  const done = new Set<string>();
  const visit = (file: string, trail: readonly string[]): void => {
    if (trail.includes(file)) cycles.push([...trail.slice(trail.indexOf(file)), file].join(' -> '));
    if (trail.includes(file) || done.has(file)) return;
    for (const other of imports.get(file) ?? []) visit(other, [...trail, file]);
    done.add(file);
  };
  for (const file of imports.keys()) visit(file, []);
  expect(cycles).toEqual([]);
});
