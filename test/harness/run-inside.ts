/**
 * Runs a command of the built program inside the test's own process, from the same files that `sheepgate` loads: starting a
 * process takes ten times as long as a short command. Owns the streams of the command; touches none of the process.
 */
import { createRequire } from 'node:module';
import { Readable, Writable } from 'node:stream';
import type { runCommand } from '../../src/cli/run.js';
import { runResult, type RunResult } from './run-result.js';

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

/** As much as a pipe gives at once. */
const PIECE_BYTES = 64 * 1024;

function* piecesOf(input: Buffer): Generator<Buffer> {
  for (let at = 0; at < input.length; at += PIECE_BYTES) yield input.subarray(at, at + PIECE_BYTES);
}

export async function runInside(
  args: readonly string[],
  env: NodeJS.ProcessEnv,
  input: string | Buffer = '',
): Promise<RunResult> {
  const program = load('../../dist/bundle/sheepgate.js') as { runCommand: typeof runCommand };
  const stdin = Readable.from(piecesOf(Buffer.from(input)), { objectMode: false });
  const [stdout, stderr] = [new Collected(), new Collected()];
  const code = await program.runCommand(args, { stdin, stdout, stderr, env });
  return runResult({ code, signal: null }, stdout.bytes, stderr.bytes);
}
