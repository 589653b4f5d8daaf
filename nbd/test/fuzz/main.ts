/** The command `npm run fuzz -- --inputs N [--seed N]`. Exits with 1 at the first input that fails, and prints its seed. */

import { parseArgs } from 'node:util';
import { fuzz } from './run.js';

const USAGE = `usage: npm run fuzz -- [options]
  --inputs N   how many (default 100000)
  --seed N     of the first one (default 1); a failure tells its own`;

function readOptions(): { readonly inputs: number; readonly seed: number } {
  try {
    const { values } = parseArgs({
      options: {
        inputs: { type: 'string', default: '100000' },
        seed: { type: 'string', default: '1' },
        help: { type: 'boolean', short: 'h', default: false },
      },
    });
    if (values.help) {
      console.log(USAGE);
      process.exit(0);
    }
    const [inputs, seed] = [Number(values.inputs), Number(values.seed)];
    if (!Number.isSafeInteger(inputs) || inputs < 1 || !Number.isSafeInteger(seed) || seed < 0) {
      throw new Error('--inputs must be a positive and --seed a whole number');
    }
    return { inputs, seed };
  } catch (error) {
    console.error(`fuzz: ${(error as Error).message}\n${USAGE}`);
    process.exit(2);
  }
}

const { inputs, seed } = readOptions();
try {
  const report = await fuzz(seed, inputs, (done) => {
    if (done % 50_000 === 0) console.error(`${done} of ${inputs}`);
  });
  const perSecond = Math.round((report.inputs / report.durationMs) * 1000);
  const memory = Math.round(report.largestMemoryBytes / 2 ** 20);
  console.log(`${report.inputs} inputs from seed ${seed}: no failure; ${perSecond} a second, at most ${memory} MiB`);
  process.exit(0);
} catch (error) {
  console.error(error instanceof Error ? error.message : error);
  process.exit(1);
}
