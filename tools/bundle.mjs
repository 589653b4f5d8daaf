/**
 * Makes dist/bundle/ of src/ and nbd/src/: what `sheepgate` runs and what `npm pack` packs. A command then loads a few files
 * made for it instead of up to two hundred, and needs no packages but the two with native code. Owns which module is in
 * which file, and the licences of what is bundled. Types are checked by tsc, not here.
 *
 *     node tools/bundle.mjs        part of 'npm run build'
 *
 * The files are CommonJS, which Node loads faster than ES modules. Nothing is minified; the source maps beside them lead from
 * a stack trace to the line in src/ (src/system/readable-stack.ts reads them when there is one to print).
 */
import fs from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { rolldown } from 'rolldown';

const ROOT = fileURLToPath(new URL('..', import.meta.url));
const OUT = path.join(ROOT, 'dist/bundle');

const ENTRIES = {
  sheepgate: 'src/cli/main.ts',
  // A process of its own; src/jobs/freeze.ts starts it by this name.
  'thaw-guard': 'src/jobs/thaw-guard.ts',
};

/**
 * The files, each with the modules that it is made for (the end of their paths). A file holds these and all that they import
 * statically, except for what an earlier file holds; so files never need each other in a circle. All that serves a request is in
 * three files: nbd, vdi and a store. Small modules that several files use belong in `command`, which is always loaded.
 */
const FILES = {
  command: [
    'cli/main.ts',
    'cli/vdi.ts',
    ...['create', 'list', 'show', 'tree', 'delete', 'resize', 'clone', 'rollback', 'lock'].map(
      (name) => `vdi-${name}.ts`,
    ),
    'open-operations.ts',
    'data-page.ts',
    'unfinished-export.ts',
    'run-as-owner.ts',
    'interrupted-fill.ts',
    'missing-option.ts',
    'interrupt.ts',
    'progress.ts',
    'file-errors.ts',
    'descriptor-limit.ts',
    'process-identity.ts',
    'limits.ts',
  ],
  system: ['libc.ts', 'durable-names.ts'],
  remote: ['control-client.ts', 'remote-operations.ts'],
  freeze: ['vdi-snapshot.ts', 'freeze.ts'],
  vdi: ['open-directly.ts'],
  'local-store': ['local-store.ts'],
  rescue: ['cli/store.ts', 'cli/store-rescue.ts', 'rescue-store.ts'],
  // Not index.ts: in a package without side effects, a module that only exports others' names is left out.
  nbd: ['nbd/src/server/server.ts', 'nbd/src/client/client.ts'],
  cluster: ['sheep-store.ts', 'cli/cluster.ts', 'inspect-cluster.ts', 'check-deep.ts'],
  copy: ['cli/backup.ts', 'cli/restore.ts', 'cli/import.ts', 'cli/export.ts', 'cli/migrate.ts'],
  serve: ['cli/serve.ts', 'daemon/daemon-process.ts'],
};

/** Native code cannot be bundled: these packages are installed beside us. */
const external = Object.keys(readJson('package.json').dependencies);

function readJson(file) {
  return JSON.parse(fs.readFileSync(path.join(ROOT, file), 'utf8'));
}

/** The sources of the library in place of tsc's output: NAME -> nbd/src/NAME.ts, according to its package.json. */
function nbdSources() {
  const { name, exports } = readJson('nbd/package.json');
  const sources = Object.entries(exports).map(([key, { default: file }]) => [
    path.posix.join(name, key),
    path.join(ROOT, 'nbd', file.replace('/dist/', '/src/').replace(/\.js$/, '.ts')),
  ]);
  // The longer names first: an alias also matches names that begin with it.
  return Object.fromEntries(sources.sort(([a], [b]) => b.length - a.length));
}

const isMadeFor = (id, end) => id.endsWith(`/${end}`);

/**
 * Without a module of FILES, commands work and are only slower: no test would show it. Errors: a module is missing, or is there
 * twice.
 */
function checkFiles(ids) {
  for (const [file, ends] of Object.entries(FILES)) {
    for (const end of ends) {
      const found = ids.filter((id) => isMadeFor(id, end));
      if (found.length === 1) continue;
      const what = found.length === 0 ? 'there is no such module' : `it may be any of ${found.join(', ')}`;
      throw new Error(`tools/bundle.mjs: FILES.${file} names ${end}: ${what}`);
    }
  }
}

/** The licences of the packages whose code is in the files: they must be distributed with it. */
function licences(ids) {
  const directories = new Set(ids.flatMap((id) => /^.*\/node_modules\/(?:@[^/]+\/)?[^/]+/.exec(id) ?? []));
  // The files also contain a few lines of rolldown itself.
  directories.add(path.join(ROOT, 'node_modules/rolldown'));
  const texts = [...directories].sort().map((directory) => {
    const { name, version, license } = JSON.parse(fs.readFileSync(path.join(directory, 'package.json'), 'utf8'));
    const file = fs.readdirSync(directory).find((entry) => /^licen[cs]e/i.test(entry));
    if (file === undefined && license === undefined) throw new Error(`tools/bundle.mjs: ${name} has no licence`);
    const text =
      file === undefined ? `Licence: ${license}` : fs.readFileSync(path.join(directory, file), 'utf8').trim();
    return `${name} ${version}\n\n${text}\n`;
  });
  return `Code of these packages is in the files beside this one.\n\n${texts.join(`\n${'-'.repeat(72)}\n\n`)}`;
}

const bundle = await rolldown({
  cwd: ROOT,
  input: ENTRIES,
  external,
  platform: 'node',
  tsconfig: false,
  // Otherwise an entry with exports would get a second file beside the one that contains it.
  preserveEntrySignatures: 'allow-extension',
  resolve: { alias: nbdSources() },
  checks: { ineffectiveDynamicImport: false },
});
fs.rmSync(OUT, { recursive: true, force: true });
const { output } = await bundle.write({
  dir: OUT,
  format: 'cjs',
  // ES modules are strict without saying so.
  strict: true,
  entryFileNames: '[name].js',
  // With a hash: a running process must not load files of another version that is installed meanwhile.
  chunkFileNames: '[name]-[hash].js',
  comments: false,
  sourcemap: true,
  sourcemapExcludeSources: true,
  codeSplitting: {
    groups: Object.entries(FILES).map(([name, ends], index, { length }) => ({
      name,
      priority: length - index,
      test: (id) => ends.some((end) => isMadeFor(id, end)),
    })),
  },
});
await bundle.close();
const ids = output.flatMap((file) => (file.type === 'chunk' ? file.moduleIds : []));
checkFiles(ids);
fs.writeFileSync(path.join(OUT, 'package.json'), '{ "type": "commonjs" }\n');
fs.writeFileSync(path.join(OUT, 'LICENSES.txt'), licences(ids));
if (process.argv.includes('--list')) {
  for (const { fileName, code, imports, moduleIds } of output.filter(({ type }) => type === 'chunk')) {
    console.log(`${fileName} ${code.length} <- ${imports.join(' ')}`);
    for (const id of moduleIds) console.log(`    ${path.relative(ROOT, id)}`);
  }
}
