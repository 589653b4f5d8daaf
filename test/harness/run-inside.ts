/**
 * Runs a command of the built program inside the test's own process, from the same files that `sheepgate` loads: starting a
 * process takes ten times as long as a short command. Owns the streams of the command; touches none of the process.
 */
import { createRequire } from 'node:module';
import { Writable } from 'node:stream';
import type { runCommand } from '../../src/cli/run.js';
import type { RunResult } from './daemon.js';

const load = createRequire(import.meta.url);

class Collected extends Writable {
  readonly #chunks: Buffer[] = [];

  override _write(chunk: Buffer, _encoding: BufferEncoding, done: () => void): void {
    this.#chunks.push(chunk);
    done();
  }

  get bytes(): Buffer {
    return Buffer.concat(this.#chunks);
  }
}

export async function runInside(args: readonly string[], env: NodeJS.ProcessEnv): Promise<RunResult> {
  const program = load('../../dist/bundle/sheepgate.js') as { runCommand: typeof runCommand };
  const [stdout, stderr] = [new Collected(), new Collected()];
  const code = await program.runCommand(args, { stdout, stderr, env });
  const stdoutBytes = stdout.bytes;
  return { code, signal: null, stdout: stdoutBytes.toString(), stderr: stderr.bytes.toString(), stdoutBytes };
}
