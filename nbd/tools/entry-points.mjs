/**
 * What users can import: `nbd-server-ts` and its subpaths. Owns this list; package.json, the tests and Sheepgate's bundle follow
 * it. To add a subpath, add a line here and run
 *
 *     node nbd/tools/entry-points.mjs        writes `exports` and `typesVersions` of package.json
 */
import fs from 'node:fs';
import { pathToFileURL } from 'node:url';

/** Subpath -> module in src/. A subpath loads little; all that it exports is exported by '.' too, where it is of use to most. */
export const ENTRY_POINTS = {
  '.': 'index',
  './block-device': 'block-device',
  './client': 'client/client',
  './limits': 'server/limits',
  // Devices
  './file': 'devices/file',
  './http-range': 'devices/http-range',
  './memory': 'devices/memory',
  // Filters: devices made of devices
  './cache': 'filters/cache',
  './delay': 'filters/delay',
  './error': 'filters/error',
  './overlay': 'filters/overlay',
  './partition': 'filters/partition',
  './read-only': 'filters/read-only',
  './stats': 'filters/stats',
};

/**
 * The first of these conditions that a program knows counts.
 *
 * `module-sync`: Node (all versions in `engines`) and some bundlers. `require` then loads the ES modules, so that a program of
 * ES modules and CommonJS has one copy of the library. That is possible as long as no module has a top-level `await`.
 * `require`: TypeScript, Jest and bundlers, from CommonJS. The copy in dist/cjs has declarations of its own: TypeScript with
 * `module: node16` refuses those of ES modules there (TS1479).
 * `default`: all others, from ES modules.
 *
 * A program may get both copies, from a bundler. They share no state, and `instanceof` of the error classes works across them.
 */
function conditions(module) {
  const esm = `./dist/${module}.js`;
  return { 'module-sync': esm, require: `./dist/cjs/${module}.js`, default: esm };
}

export function exportsOf(entryPoints) {
  return Object.fromEntries(Object.entries(entryPoints).map(([name, module]) => [name, conditions(module)]));
}

/** For `moduleResolution: node10`, which does not know `exports`: subpath -> declarations. */
export function typesVersionsOf(entryPoints) {
  const subpaths = Object.entries(entryPoints).filter(([name]) => name !== '.');
  return { '*': Object.fromEntries(subpaths.map(([name, module]) => [name.slice(2), [`./dist/cjs/${module}.d.ts`]])) };
}

if (import.meta.url === pathToFileURL(process.argv[1] ?? '').href) {
  const file = new URL('../package.json', import.meta.url);
  const manifest = JSON.parse(fs.readFileSync(file, 'utf8'));
  manifest.exports = exportsOf(ENTRY_POINTS);
  manifest.typesVersions = typesVersionsOf(ENTRY_POINTS);
  fs.writeFileSync(file, `${JSON.stringify(manifest, undefined, 2)}\n`);
}
