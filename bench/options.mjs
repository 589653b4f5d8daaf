/** The command line of a benchmark: --help, and one line for a wrong option. It is read before anything is made. */
import fs from 'node:fs';
import path from 'node:path';
import { parseArgs } from 'node:util';

/**
 * The values of `options` (as parseArgs takes them). Ends the process with 0 after the usage, with 2 after an error.
 * `numbers`: the options that must be above zero. `--only` is a regular expression, `--dist` a build, `--dir` a directory.
 */
export function readOptions({ program, usage, options, numbers = [] }) {
  try {
    const { values } = parseArgs({ options: { ...options, help: { type: 'boolean', short: 'h', default: false } } });
    if (values.help) {
      process.stdout.write(`${usage}\n`);
      process.exit(0);
    }
    for (const name of numbers) {
      if (!(Number(values[name]) > 0 && Number.isFinite(Number(values[name])))) {
        throw new Error(`--${name}: "${values[name]}" is not a number above zero`);
      }
    }
    if (values.only !== undefined) new RegExp(values.only);
    if (values.dist !== undefined && !fs.existsSync(path.join(values.dist, 'cli/main.js'))) {
      throw new Error(`--dist: ${values.dist} is not a build; run 'npm run build'`);
    }
    if (values.dir !== undefined && !fs.statSync(values.dir, { throwIfNoEntry: false })?.isDirectory()) {
      throw new Error(`--dir: ${values.dir} is not a directory`);
    }
    return values;
  } catch (error) {
    process.stderr.write(`${program}: ${error.message}\n${usage}\n`);
    process.exit(2);
  }
}
