/** The scripts of the repository: each answers --help, and reports a wrong option in one line with exit code 2. */
import path from 'node:path';
import { expect, test } from 'vitest';
import { run } from '../harness/daemon.js';

const ROOT = path.resolve(import.meta.dirname, '../..');
const NODE_SCRIPTS = ['run', 'attacks', 'attack-clients', 'cluster', 'pauses'].map((name) => `bench/${name}.mjs`);
const EXAMPLES = ['backup-now', 'ext4-from-folder', 'qemu-io-session', 'rsync-from-snapshot', 'snapshot-while-writing'];

test('benchmarks and recorders answer --help, and report wrong options', async () => {
  await Promise.all(
    [...NODE_SCRIPTS, 'test/sheep/record.mjs'].map(async (script) => {
      const asked = await run(process.execPath, [script, '--help'], { cwd: ROOT });
      expect(asked, script).toMatchObject({ code: 0, stderr: '', stdout: expect.stringMatching(/^usage: /) as string });
      const wrong = await run(process.execPath, [script, '--nope'], { cwd: ROOT });
      expect(wrong, script).toMatchObject({
        code: 2,
        stdout: '',
        stderr: expect.stringMatching(/^usage: |'--nope'/) as string,
      });
      expect(wrong.stderr, script).not.toMatch(/\n\s+at /);
    }),
  );
  for (const [args, says] of [
    [['--seconds', 'x'], /--seconds: "x" is not a number above zero/],
    [['--only', '('], /Invalid regular expression/],
    [['--dist', '/nowhere'], /--dist: \/nowhere is not a build/],
    [['--dir', '/nowhere'], /--dir: \/nowhere is not a directory/],
  ] as const) {
    const wrong = await run(process.execPath, ['bench/attacks.mjs', ...args], { cwd: ROOT });
    expect(wrong, args[0]).toMatchObject({ code: 2, stdout: '', stderr: expect.stringMatching(says) as string });
  }
});

test('the benchmark of a cluster reports that sheep and dog are missing', async () => {
  const env = { PATH: ROOT };
  const asked = await run(process.execPath, ['bench/cluster.mjs', '--quick'], { cwd: ROOT, env });
  expect(asked).toMatchObject({
    code: 1,
    stdout: '',
    stderr: expect.stringMatching(/no sheep and dog on the PATH/) as string,
  });
});

test('npm run fuzz answers --help, and reports wrong options', async () => {
  const asked = await run('npm', ['run', '--silent', 'fuzz', '--', '--help'], { cwd: ROOT });
  expect(asked).toMatchObject({ code: 0, stderr: '', stdout: expect.stringMatching(/^usage: npm run fuzz/) as string });
  const main = path.join(ROOT, 'nbd/test/fuzz/dist/test/fuzz/main.js');
  for (const [args, says] of [
    [['--nope'], /^fuzz: Unknown option '--nope'/],
    [['more'], /^fuzz: Unexpected argument 'more'/],
    [['--inputs', '0'], /^fuzz: --inputs must be a positive/],
  ] as const) {
    const wrong = await run(process.execPath, [main, ...args]);
    expect(wrong, args[0]).toMatchObject({ code: 2, stdout: '', stderr: expect.stringMatching(says) as string });
    expect(wrong.stderr).not.toMatch(/\n\s+at /);
  }
});

test('examples answer --help with their description', async () => {
  for (const name of EXAMPLES) {
    const asked = await run('sh', [`examples/${name}.sh`, '--help'], { cwd: ROOT });
    expect(asked, name).toMatchObject({ code: 0, stderr: '' });
    expect(asked.stdout, name).toContain(`  sh examples/${name}.sh`);
  }
});
