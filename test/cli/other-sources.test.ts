/** Sources that eslint does not read: shell scripts, C and Python are checked by the tools of their languages. */
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { describe, expect, test } from 'vitest';
import { haveCommand, needs, run, skipBecause } from '../harness/daemon.js';

const ROOT = path.resolve(import.meta.dirname, '../..');
const FOLDERS = ['bench', 'examples', 'test'];

const sources = FOLDERS.flatMap((folder) =>
  fs
    .readdirSync(path.join(ROOT, folder), { recursive: true, encoding: 'utf8' })
    .filter((name) => !name.includes('dist/') && !name.includes('__pycache__'))
    .map((name) => path.join(folder, name)),
);
const ofKind = (ending: string): string[] => sources.filter((name) => name.endsWith(ending));

needs('shellcheck')('shellcheck finds nothing in the shell scripts', async () => {
  const scripts = ofKind('.sh');
  expect(scripts).toContain('examples/backup-now.sh');
  const checked = await run('shellcheck', ['--severity=warning', '--shell=sh', ...scripts], { cwd: ROOT });
  expect(checked.stdout + checked.stderr).toBe('');
});

describe('the C sources compile without a warning', () => {
  test.for(ofKind('.c'))('%s', (name, context) => {
    if (!haveCommand('gcc')) skipBecause(context, 'gcc is not installed (sh test/install.sh installs it)');
    const headers = fs.readFileSync(path.join(ROOT, name), 'utf8').matchAll(/^#include <([\w./-]+)>/gm);
    for (const [, header = ''] of headers) {
      if (!hasHeader(header)) skipBecause(context, `${name} needs <${header}>, which is not installed`);
    }
    const said = execFileSync('gcc', ['-Wall', '-Wextra', '-Werror', '-fsyntax-only', name], { cwd: ROOT });
    expect(said.toString()).toBe('');
  });
});

needs('python3')('the Python sources compile', async () => {
  const scripts = ofKind('.py');
  expect(scripts).toContain('examples/guest-fsfreeze.py');
  const compile = 'import ast, sys\nfor name in sys.argv[1:]: ast.parse(open(name).read(), name)';
  expect(await run('python3', ['-c', compile, ...scripts], { cwd: ROOT })).toMatchObject({ code: 0, stderr: '' });
});

function hasHeader(header: string): boolean {
  try {
    execFileSync('gcc', ['-fsyntax-only', '-x', 'c', '-'], { input: `#include <${header}>\n`, stdio: 'pipe' });
    return true;
  } catch {
    return false;
  }
}
