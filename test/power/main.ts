/**
 * The command line of the power loss harness: how many states of which seed, one state again, a long run that can be
 * interrupted and goes on later. Owns the options, the progress file, and what is printed.
 */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { FAULTS, findFault, type Fault } from './faults.js';
import { enumerate, newProgress, replay, type Progress } from './enumerate.js';

const USAGE = `Usage: npm run power -- [--states N] [--seed TEXT] [--resume FILE] [--state NAME]

  --states N      stop when so many distinct states were checked (20000)
  --seed TEXT     of the workloads (the date)
  --resume FILE   write the progress there after each workload, and go on from there if the file exists
  --state NAME    check one state again: the name that a failure has printed
  --backups       each workload takes backups
  --fault NAME    plant a mistake, and look until it is found: ${FAULTS.join(', ')}
`;

const DEFAULT_STATES = '20000';
/** Failures after which a run ends. */
const MAX_FAILURES = 20;
/** Workloads between two lines. */
const LINE_EVERY = 5;

interface Saved extends Progress {
  readonly seed: string;
  seconds: number;
  readonly failures: string[];
}

const { values } = parseArgs({
  options: {
    states: { type: 'string', default: DEFAULT_STATES },
    seed: { type: 'string' },
    resume: { type: 'string' },
    state: { type: 'string' },
    fault: { type: 'string' },
    backups: { type: 'boolean', default: false },
    help: { type: 'boolean', short: 'h' },
  },
});
const place = fs.mkdtempSync(path.join(fs.existsSync('/dev/shm') ? '/dev/shm' : os.tmpdir(), 'sheepgate-power-'));
process.on('exit', () => fs.rmSync(place, { recursive: true, force: true }));
for (const signal of ['SIGINT', 'SIGTERM'] as const) {
  process.on(signal, () => {
    fs.rmSync(place, { recursive: true, force: true });
    // An ordinary exit waits for a transaction of LMDB, which this loop has to answer.
    process.kill(process.pid, 'SIGKILL');
  });
}

if (values.help) process.stdout.write(USAGE);
else if (values.state !== undefined) {
  const kind = await replay(values.state, { place, ...(values.backups ? { takesBackups: true } : {}) });
  process.stdout.write(`${values.state} (${kind}): nothing is wrong\n`);
} else if (values.fault !== undefined) await runWithFault(values.fault);
else await run();
process.exit();

async function runWithFault(name: string): Promise<void> {
  const fault = FAULTS.find((each): each is Fault => each === name);
  if (fault === undefined) throw new Error(`no such fault; there are: ${FAULTS.join(', ')}`);
  const { failure, progress } = await findFault(fault, {
    seed: values.seed ?? 'faults',
    place,
    states: Number(values.states),
  });
  process.stdout.write(
    `${name}: ${progress.states} states, then ${failure?.state ?? 'not found'}: ${failure?.error.message ?? ''}\n`,
  );
}

async function run(): Promise<void> {
  const file = values.resume;
  const saved: Saved =
    file !== undefined && fs.existsSync(file)
      ? (JSON.parse(fs.readFileSync(file, 'utf8')) as Saved)
      : { ...newProgress(), seed: values.seed ?? new Date().toISOString().slice(0, 10), seconds: 0, failures: [] };
  const before = saved.seconds;
  const start = process.hrtime.bigint();
  const checkedBefore = saved.states;
  process.stdout.write(`seed ${saved.seed}, from workload ${saved.workloads}\n`);
  const note = (): void => {
    const seconds = Number((process.hrtime.bigint() - start) / 1_000_000n) / 1000;
    saved.seconds = before + seconds;
    if (file !== undefined) {
      fs.writeFileSync(`${file}.new`, `${JSON.stringify(saved, undefined, 2)}\n`);
      fs.renameSync(`${file}.new`, file);
    }
    if (saved.workloads % LINE_EVERY !== 0 && saved.states < Number(values.states)) return;
    const rate = (saved.states - checkedBefore) / seconds;
    process.stdout.write(
      `${saved.states} states of ${saved.workloads} workloads, ${rate.toFixed(0)} a second, ${saved.failures.length} violations\n`,
    );
  };
  await enumerate(
    {
      seed: saved.seed,
      place,
      states: Number(values.states),
      ...(values.backups ? { takesBackups: true } : {}),
      done: note,
      failed: ({ state, error }) => {
        saved.failures.push(state);
        process.stdout.write(
          `\n${state}: ${error.message}\n  again: npm run power -- ${values.backups ? '--backups ' : ''}--state ${state}\n\n`,
        );
        return saved.failures.length < MAX_FAILURES;
      },
    },
    saved,
  );
  note();
  process.stdout.write(`${JSON.stringify(saved, undefined, 2)}\n`);
  process.exitCode = saved.failures.length > 0 ? 1 : 0;
}
