/**
 * Completes dist/, as tsc wrote it, to what is published: dist/cjs is a copy in CommonJS with its own declarations, and all
 * declarations that need Node's types say so. Part of `npm pack` (`prepack` in package.json); `npm run build` does without, since
 * Sheepgate loads ES modules. It checks no types: tsc has done that.
 */
import fs from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import ts from 'typescript';

const PACKAGE = fileURLToPath(new URL('..', import.meta.url));
const SOURCES = path.join(PACKAGE, 'src');
const DIST = path.join(PACKAGE, 'dist');
const COMMONJS = path.join(DIST, 'cjs');

const filesIn = (directory) =>
  fs.readdirSync(directory, { recursive: true }).filter((name) => fs.statSync(path.join(directory, name)).isFile());

function write(file, text) {
  fs.mkdirSync(path.dirname(file), { recursive: true });
  fs.writeFileSync(file, text);
}

/** CommonJS, and otherwise what dist/ was compiled with. */
function compilerOptions() {
  const file = path.join(PACKAGE, 'tsconfig.json');
  const { options, errors } = ts.getParsedCommandLineOfConfigFile(file, {}, ts.sys) ?? {};
  if (options === undefined || errors.length > 0) throw new Error(`${file} cannot be read`);
  const { target, strict } = options;
  const kind = { module: ts.ModuleKind.CommonJS, esModuleInterop: true };
  return { target, strict, ...kind, isolatedModules: true, sourceMap: true };
}

/** One module at a time, and not one file of all: an error class must be the same in every subpath. */
function writeCommonJs(options) {
  for (const source of filesIn(SOURCES).filter((name) => name.endsWith('.ts'))) {
    const { outputText, sourceMapText, diagnostics } = ts.transpileModule(
      fs.readFileSync(path.join(SOURCES, source), 'utf8'),
      { fileName: path.basename(source), compilerOptions: options, reportDiagnostics: true },
    );
    const [problem] = diagnostics;
    if (problem) throw new Error(`${source}: ${ts.flattenDiagnosticMessageText(problem.messageText, '\n')}`);
    const output = path.join(COMMONJS, source.replace(/\.ts$/, '.js'));
    write(output, outputText);
    const map = JSON.parse(sourceMapText);
    map.sources = [path.relative(path.dirname(output), path.join(SOURCES, source))];
    write(`${output}.map`, JSON.stringify(map));
  }
  // Also for bundlers, which read `sideEffects` in the package.json next to a module.
  write(path.join(COMMONJS, 'package.json'), `${JSON.stringify({ type: 'commonjs', sideEffects: false })}\n`);
}

/**
 * TypeScript then finds them also where `types` of a user's tsconfig.json lists nothing, which is the default since TypeScript 6.
 * They are a dependency, as TypeScript's handbook has it for types that declarations mention (Publishing, Dependencies), in any
 * version: two versions in one program contradict each other, so the user's own must be good enough.
 */
const NODE_TYPES = '/// <reference types="node" />\n';
const needsNodeTypes = (declarations) => /\bBuffer\b|\bNodeJS\.|'node:|"node:/.test(declarations);

/** Node's modules have a default export only for users with `esModuleInterop`, which `module: commonjs` does not imply. */
const withoutDefaultImports = (declarations) =>
  declarations.replace(/^import (type )?(\w+) from (?=['"]node:)/gm, 'import $1* as $2 from ');

/** Declarations say that they need Node's types; dist/cjs gets a copy of them, because their kind of module is their folder's. */
function completeDeclarations() {
  const names = filesIn(DIST).filter((name) => name.endsWith('.d.ts') && !name.startsWith('cjs/'));
  for (const name of names) {
    const map = JSON.parse(fs.readFileSync(path.join(DIST, `${name}.map`), 'utf8'));
    let text = withoutDefaultImports(fs.readFileSync(path.join(DIST, name), 'utf8'));
    if (needsNodeTypes(text)) {
      text = NODE_TYPES + text;
      // One line without a mapping.
      map.mappings = `;${map.mappings}`;
    }
    write(path.join(DIST, name), text);
    write(path.join(DIST, `${name}.map`), JSON.stringify(map));
    write(path.join(COMMONJS, name), text);
    const sources = map.sources.map((source) =>
      path.relative(path.dirname(path.join(COMMONJS, name)), path.resolve(path.dirname(path.join(DIST, name)), source)),
    );
    write(path.join(COMMONJS, `${name}.map`), JSON.stringify({ ...map, sources }));
  }
}

writeCommonJs(compilerOptions());
completeDeclarations();
