/** Whether dist/bundle/, which the tests of the program run, was built from the present sources. */
import fs from 'node:fs';
import path from 'node:path';

const ROOT = path.resolve(import.meta.dirname, '../..');
const BUILT = path.join(ROOT, 'dist/bundle/sheepgate.js');

let problem: string | undefined | null = null;

/** Errors: the program is not built, or src/ or nbd/src/ has changed since. Checked once per test file. */
export function requireBuild(): void {
  if (problem === null) problem = buildProblem();
  if (problem !== undefined) throw new Error(`${problem}; run 'npm run build'`);
}

function buildProblem(): string | undefined {
  const builtAt = fs.statSync(BUILT, { throwIfNoEntry: false })?.mtimeMs;
  if (builtAt === undefined) return 'dist/bundle is not built';
  const changed = ['src', 'nbd/src'].flatMap(sourcesIn).find((file) => fs.statSync(file).mtimeMs > builtAt);
  return changed === undefined ? undefined : `dist/bundle is older than ${path.relative(ROOT, changed)}`;
}

function sourcesIn(directory: string): string[] {
  const names = fs.readdirSync(path.join(ROOT, directory), { recursive: true, encoding: 'utf8' });
  return names.filter((name) => name.endsWith('.ts')).map((name) => path.join(ROOT, directory, name));
}
