/**
 * The packed library as users get it: what is in the file, that its types and metadata are right, and that a program of a user
 * works with it in every form: ES modules, CommonJS, TypeScript, bundled, on Deno and on Bun. Real clients use each of them.
 */
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import { SourceMap, type SourceMapPayload } from 'node:module';
import os from 'node:os';
import path from 'node:path';
import { rolldown } from 'rolldown';
import { afterAll, beforeAll, describe, expect, test, type TestContext } from 'vitest';
import { installTools, type Tool, type ToolName } from './newest-tools.js';
import {
  LIBRARY,
  copyProject,
  installLibrary,
  ownModule,
  packLibrary,
  readManifest,
  run,
  whileServing,
  type PackedLibrary,
} from './packed-library.js';

/** Compressed. */
const MAX_PACKED_BYTES = 700_000;
const PACKED = new RegExp(
  [
    /^(?:package\.json|README\.md|LICENSE|dist\/cjs\/package\.json)$/,
    /^docs\/[\w/.-]+\.md$/,
    /^examples\/[\w-]+\.mjs$/,
    /^src\/(?:[\w-]+\/)*[\w-]+\.ts$/,
    /^dist\/(?:[\w-]+\/)*[\w-]+\.(?:js|d\.ts)(?:\.map)?$/,
  ]
    .map(({ source }) => source)
    .join('|'),
);
/** A bundle that uses one constant. */
const MAX_SMALL_BUNDLE_BYTES = 2_000;
/** More than a request may have, so that clients split it. */
const IMAGE_BYTES = 4 * 1024 * 1024;

/** Bound for what starts a compiler or a bundler several times, or installs them. */
const MANY_RUNS_MS = 300_000;

const directory = fs.mkdtempSync(path.join(os.tmpdir(), 'nbd-packed-'));
let packed: PackedLibrary;
let tools: ReadonlyMap<ToolName, Tool>;

/** A user's project that has program.ts in all languages: compiled once, run in many ways. */
const project = path.join(directory, 'project');

const textOf = (file: string): string => fs.readFileSync(path.join(packed.unpacked, file), 'utf8');

function have(program: string): boolean {
  try {
    execFileSync('sh', ['-c', `command -v ${program}`], { stdio: 'ignore' });
    return true;
  } catch {
    return false;
  }
}

const missingClients = ['nbdinfo', 'nbdcopy'].filter((program) => !have(program));
if (missingClients.length > 0) console.log(`skipped: the packed library with ${missingClients.join(', ')}`);

/** Runs a form of program.ts, and uses its disk with libnbd's tools. */
async function serves(command: readonly [string, ...string[]], cwd: string, env = {}): Promise<void> {
  const image = path.join(cwd, 'image');
  const copy = path.join(cwd, 'copy');
  fs.writeFileSync(image, Buffer.alloc(IMAGE_BYTES, 'every byte of it comes back; '));
  await whileServing(command, { cwd, env }, async (uri) => {
    if (missingClients.length > 0) return;
    expect(await run('nbdinfo', ['--json', uri], { cwd })).toMatch(/"export-size": 4194304/);
    await run('nbdcopy', [image, uri], { cwd });
    await run('nbdcopy', [uri, copy], { cwd });
  });
  if (missingClients.length === 0) expect(fs.readFileSync(copy).equals(fs.readFileSync(image))).toBe(true);
}

/** Import and require in one program. */
async function sharesCopies(node: string): Promise<void> {
  const program = path.join(project, 'two-copies.mjs');
  fs.copyFileSync(path.join(import.meta.dirname, 'two-copies.mjs'), program);
  expect(await run(node, [program, 'one'], { cwd: project })).toBe('both\n');
  expect(await run(node, ['--no-experimental-require-module', program, 'two'], { cwd: project })).toBe('both\n');
}

/** The tool, or the end of the test: installTools has printed why it is missing. */
function toolFor({ skip }: TestContext, name: ToolName): Tool {
  return tools.get(name) ?? skip(`no ${name}`);
}

/** Checks the types of program.ts, and writes JavaScript to `out` if it is given. */
async function compile(
  compiler: readonly [string, ...string[]],
  cwd: string,
  files: readonly string[],
  options: Readonly<Record<string, unknown>>,
): Promise<void> {
  const always = { target: 'es2022', lib: ['es2022'], strict: true, skipLibCheck: false, isolatedModules: true };
  for (const name of TYPED_USES) fs.copyFileSync(path.join(import.meta.dirname, name), path.join(cwd, name));
  const config = path.join(cwd, 'tsconfig.json');
  fs.writeFileSync(config, JSON.stringify({ compilerOptions: { ...always, ...options }, files }));
  const [command, ...args] = compiler;
  await run(command, [...args, '-p', config], { cwd });
}

/** The source of the program, in `to`, with names that say which kind of module it is there. */
function copyProgram(to: string, ...names: readonly string[]): void {
  for (const name of names) fs.copyFileSync(path.join(import.meta.dirname, 'program.ts'), path.join(to, name));
}

/** Beside the program, in each project that is compiled. */
const TYPED_USES = ['wrong-uses.ts'];
const OWN_COMPILER = [process.execPath, ownModule('typescript/bin/tsc')] as const;

beforeAll(async () => {
  const install = async (): Promise<void> => {
    packed = await packLibrary(directory);
    await installLibrary(project, packed);
    copyProgram(project, 'program.mts', 'program.cts');
    await compile(OWN_COMPILER, project, ['program.mts', 'program.cts', ...TYPED_USES], { module: 'node16' });
  };
  [tools] = await Promise.all([installTools(), install()]);
}, MANY_RUNS_MS);
afterAll(() => fs.rmSync(directory, { recursive: true, force: true }));

describe('the file', () => {
  test('holds the compiled library, its sources and its documents, and nothing else', () => {
    expect(packed.files.filter((file) => !PACKED.test(file))).toEqual([]);
    const some = [
      'LICENSE',
      'README.md',
      'dist/index.js',
      'dist/cjs/index.d.ts',
      'src/index.ts',
      'docs/conformance.md',
    ];
    expect(packed.files).toEqual(expect.arrayContaining(some));
    expect(fs.statSync(packed.tarball).size).toBeLessThan(MAX_PACKED_BYTES);
  });

  test('has a module and declarations for each source, in both kinds', () => {
    const sources = packed.files.filter((file) => file.startsWith('src/'));
    expect(sources.length).toBeGreaterThan(50);
    const made = sources.flatMap((file) => {
      const name = file.replace(/^src\//, '').replace(/\.ts$/, '');
      return ['', 'cjs/'].flatMap((kind) =>
        ['.js', '.js.map', '.d.ts', '.d.ts.map'].map((end) => `dist/${kind}${name}${end}`),
      );
    });
    const inDist = packed.files.filter((file) => file.startsWith('dist/') && file !== 'dist/cjs/package.json');
    expect(inDist.sort()).toEqual(made.sort());
  });

  test('has maps that lead to the line in the sources', () => {
    const maps = packed.files.filter((file) => file.endsWith('.map'));
    const lost = maps.flatMap((file) => {
      const { sources } = JSON.parse(textOf(file)) as SourceMapPayload;
      return sources.filter((source) => !packed.files.includes(path.join(path.dirname(file), source)));
    });
    expect(lost).toEqual([]);
    const isOfServer = (file: string): boolean => /\/server\/server\.(?:js|d\.ts)$/.test(file);
    const made = packed.files.filter(isOfServer);
    expect(made).toHaveLength(4);
    for (const file of made) {
      const line = textOf(file)
        .split('\n')
        .findIndex((text) => /\bclass NbdServer\b/.test(text));
      const map = new SourceMap(JSON.parse(textOf(`${file}.map`)) as SourceMapPayload);
      const { originalLine } = map.findEntry(line, 0) as { originalLine: number };
      expect(textOf('src/server/server.ts').split('\n')[originalLine], file).toMatch(/^export class NbdServer\b/);
    }
  });

  test('has every document that its documents link to', () => {
    const dead = packed.files
      .filter((file) => file.endsWith('.md'))
      .flatMap((file) => {
        const links = [...textOf(file).matchAll(/\]\((?!\w+:)([^)#\s]+)/g)].map(([, link = '']) => link);
        const lost = links.filter((link) => !fs.existsSync(path.join(packed.unpacked, path.dirname(file), link)));
        return lost.map((link) => `${file}: ${link}`);
      });
    expect(dead).toEqual([]);
  });
});

describe('package.json', () => {
  test('exports what nbd/tools/entry-points.mjs lists', async () => {
    const before = readManifest(LIBRARY);
    await run(process.execPath, ['tools/entry-points.mjs'], { cwd: packed.source });
    expect(before, 'run: node nbd/tools/entry-points.mjs').toEqual(readManifest(packed.source));
  });

  test('names files that are there, and that load by import and by require', async () => {
    const { name, exports } = readManifest(packed.unpacked);
    const wanted = Object.values(exports).flatMap((conditions) => Object.values(conditions));
    expect(wanted.filter((file) => !packed.files.includes(path.normalize(file)))).toEqual([]);
    const load = `
      const { isDeepStrictEqual } = require('node:util');
      (async () => {
        for (const name of process.argv.slice(1)) {
          const [required, imported] = [require(name), await import(name)];
          const names = Object.keys(imported).sort();
          if (!isDeepStrictEqual(Object.keys(required).sort(), names)) throw new Error(name + ' differs');
          console.log(name, names.length);
        }
      })()`;
    const names = Object.keys(exports).map((subpath) => name + subpath.slice(1));
    for (const flags of [[], ['--no-experimental-require-module']]) {
      const loaded = await run(process.execPath, [...flags, '-e', load, ...names], { cwd: project });
      expect(loaded.match(/^\S+ [1-9]\d*$/gm)).toHaveLength(names.length);
    }
  });

  test('needs no correction by npm when it is published', async () => {
    await run('npm', ['pkg', 'fix'], { cwd: packed.source });
    expect(readManifest(packed.source)).toEqual(readManifest(LIBRARY));
  });

  test('and the files that it names have no complaint from publint', async () => {
    const said = await run(process.execPath, [ownModule('publint/src/cli.js'), 'run', packed.tarball, '--strict'], {
      cwd: directory,
    });
    expect(said).toContain('All good!');
  });

  test('and the declarations have no complaint from are-the-types-wrong, for any kind of resolution', async () => {
    const attw = ownModule('@arethetypeswrong/cli/dist/index.js');
    const said = await run(
      process.execPath,
      [attw, packed.tarball, '--no-definitely-typed', '--no-color', '-f', 'ascii'],
      {
        cwd: directory,
      },
    );
    expect(said).toContain('No problems found');
  });
});

describe('a program on Node', () => {
  test('that is an ES module', () => serves([process.execPath, 'program.mjs'], project));

  test('that is CommonJS', () => serves([process.execPath, 'program.cjs'], project));

  test('that is CommonJS, where require loads no ES modules', () =>
    serves([process.execPath, '--no-experimental-require-module', 'program.cjs'], project));

  test.each([
    ['module', 'program.mjs'],
    ['commonjs', 'program.cjs'],
  ])('that is plain .js in a project of type %s', async (type, program) => {
    const plain = copyProject(project, path.join(directory, `plain-${type}`), { type });
    fs.copyFileSync(path.join(project, program), path.join(plain, 'program.js'));
    await serves([process.execPath, 'program.js'], plain);
  });

  test('has one copy of the library by import and require, and two get on with each other', () =>
    sharesCopies(process.execPath));

  test('has what the packed examples import', async () => {
    const examples = packed.files.filter((file) => file.startsWith('examples/'));
    expect(examples.length).toBeGreaterThan(0);
    for (const file of examples) {
      const imports = textOf(file).match(/^import [^;]* from 'nbd-server-ts[^']*';$/gm) ?? [];
      expect(imports.length, file).toBeGreaterThan(0);
      // A name that the module does not export is an error before anything runs.
      await run(process.execPath, ['--input-type=module', '-e', imports.join('\n')], { cwd: project });
    }
  });
});

describe('TypeScript, strict and with the declarations checked', () => {
  /** Of projects: the files that are checked as CommonJS or as an ES module, and the settings. */
  const NODENEXT = {
    files: ['program.mts', 'program.cts', 'required.cts', ...TYPED_USES],
    options: { module: 'nodenext', exactOptionalPropertyTypes: true },
  };
  const BUNDLER = { files: ['program.ts', ...TYPED_USES], options: { module: 'esnext', moduleResolution: 'bundler' } };
  const NODE10 = { files: ['program.ts', ...TYPED_USES], options: { module: 'commonjs', moduleResolution: 'node10' } };

  async function accepts(
    compiler: readonly [string, ...string[]],
    typed: string,
    settings: readonly { files: readonly string[]; options: object }[],
  ): Promise<void> {
    copyProgram(typed, 'program.ts', 'program.mts', 'program.cts');
    fs.writeFileSync(
      path.join(typed, 'required.cts'),
      "import nbd = require('nbd-server-ts');\nexport const count = (server: nbd.NbdServer): number => server.connections.size;\n",
    );
    for (const { files, options } of settings) await compile(compiler, typed, files, { ...options, noEmit: true });
  }

  test(
    'of this repository accepts it in each kind of module',
    async () => {
      const typed = copyProject(project, path.join(directory, 'typed'));
      await accepts(OWN_COMPILER, typed, [NODENEXT, BUNDLER, NODE10]);
    },
    MANY_RUNS_MS,
  );

  test(
    'in its newest version, with the newest @types/node, accepts it in each kind of module',
    async (context) => {
      const { program, module } = toolFor(context, 'typescript');
      const typed = copyProject(project, path.join(directory, 'typed-newest'));
      const types = path.join(typed, 'node_modules/@types/node');
      fs.rmSync(types, { recursive: true });
      fs.symlinkSync(module('@types/node'), types);
      const node16 = { ...NODENEXT, options: { module: 'node16' } };
      await accepts([program], typed, [node16, NODENEXT, BUNDLER]);
    },
    MANY_RUNS_MS,
  );
});

describe('bundled', () => {
  /** A bundler: makes `output`, an ES module or CommonJS, of `input` in `project`. */
  type Bundle = (input: string, output: string, format: 'esm' | 'cjs') => Promise<unknown>;

  /** A program of each kind is served from one file without node_modules; of one constant, only that is in the file. */
  async function servesBundled(name: string, bundle: Bundle): Promise<void> {
    const out = path.join(directory, name);
    fs.mkdirSync(out);
    for (const [input, format, output] of [
      ['program.mjs', 'esm', 'from-esm.mjs'],
      ['program.mjs', 'cjs', 'from-esm.cjs'],
      ['program.cjs', 'cjs', 'from-cjs.cjs'],
    ] as const) {
      await bundle(input, path.join(out, output), format);
      await serves([process.execPath, output], out);
    }
    fs.writeFileSync(
      path.join(project, 'small.mjs'),
      "import { MAX_PAYLOAD } from 'nbd-server-ts';\nconsole.log(MAX_PAYLOAD);\n",
    );
    const small = path.join(out, 'small.mjs');
    await bundle('small.mjs', small, 'esm');
    expect(await run(process.execPath, [small], { cwd: out })).toBe('33554432\n');
    expect(fs.statSync(small).size).toBeLessThan(MAX_SMALL_BUNDLE_BYTES);
  }

  test('by rolldown', () =>
    servesBundled('rolldown', async (input, file, format) => {
      const bundle = await rolldown({ cwd: project, input, platform: 'node' });
      await bundle.write({ file, format });
      await bundle.close();
    }));

  test('by esbuild', async (context) => {
    const { program } = toolFor(context, 'esbuild');
    const fixed = ['--bundle', '--platform=node', '--log-level=warning'];
    await servesBundled('esbuild', (input, output, format) =>
      run(program, [input, ...fixed, `--format=${format}`, `--outfile=${output}`], { cwd: project }),
    );
  });

  test(
    'by webpack',
    async (context) => {
      const { module } = toolFor(context, 'webpack');
      const script = `
      const [webpack, input, output, format] = process.argv.slice(1);
      const { basename, dirname, resolve } = require('node:path');
      const isModule = format === 'esm';
      require(webpack)({
        ...{ mode: 'production', target: 'node20', entry: resolve(input), experiments: { outputModule: isModule } },
        // It takes seconds, and shows here only what can be left out.
        optimization: { minimize: basename(output) === 'small.mjs' },
        output: { path: dirname(output), filename: basename(output), module: isModule },
      }, (error, stats) => {
        if (error) throw error;
        if (stats.hasErrors() || stats.hasWarnings()) throw new Error(stats.toString());
      });`;
      await servesBundled('webpack', (input, output, format) =>
        run(process.execPath, ['-e', script, module('webpack'), input, output, format], { cwd: project }),
      );
    },
    MANY_RUNS_MS,
  );
});

describe('a program on another runtime', () => {
  test('the newest Node', async (context) => {
    const { program } = toolFor(context, 'node');
    for (const name of ['program.mjs', 'program.cjs']) await serves([program, name], project);
    await sharesCopies(program);
  });

  test('Deno, which also checks its types', async (context) => {
    const { program } = toolFor(context, 'deno');
    // Without our tsconfig.json, which Deno obeys.
    const plain = copyProject(project, path.join(directory, 'deno-project'));
    for (const name of ['program.mjs', 'program.mts', 'program.cjs'])
      fs.copyFileSync(path.join(project, name), path.join(plain, name));
    const env = { DENO_DIR: path.join(directory, 'deno'), DENO_NO_UPDATE_CHECK: '1' };
    const always = ['--node-modules-dir=manual', '--no-remote'];
    await serves([program, 'run', '--allow-all', ...always, 'program.mjs'], plain, env);
    await serves([program, 'run', '--allow-all', ...always, '--check', 'program.mts'], plain, env);
    await serves([program, 'run', '--allow-all', ...always, 'program.cjs'], plain, env);
  });

  test('Bun', async (context) => {
    const { program } = toolFor(context, 'bun');
    // Otherwise it keeps compiled files in the home directory.
    const env = { BUN_RUNTIME_TRANSPILER_CACHE_PATH: '0' };
    for (const name of ['program.mjs', 'program.mts', 'program.cjs'])
      await serves([program, 'run', name], project, env);
  });
});
