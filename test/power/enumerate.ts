/**
 * Enumerates crash states: workload after workload of a seed, every recorded moment of each, several losses for each moment.
 * Owns the order, the names of states (seed/workload/moment/choice), and the count of distinct ones.
 */
import { checkState, recover, type State } from './check-state.js';
import { crashFiles, digestOf, type Loss } from './crash-state.js';
import { Violation } from './findings.js';
import type { Identity } from './machine.js';
import { Random } from './random.js';
import { record, type Workload, type WorkloadOptions } from './workload.js';

/** For each moment. */
const CHOICES_PER_MOMENT = 4;
/** Of one workload: a workload takes as long to record as some twenty states to check, and more workloads show more. */
const STATES_PER_WORKLOAD = 120;
/** A state takes some 20 ms; one that takes this long will never end. */
const STATE_MS = 60_000;
/** A first crash is followed by one during the recovery so often. */
const SECOND_CRASH = 0.12;

/** After something was removed. */
const DANGEROUS_MOMENTS = 4;

const LOSSES = { strict: 5, ext4: 3, death: 2, away: 1 } as const;

/** What follows which loss in a second crash. What a killed process has not synced is not durable: see Run in workload.ts. */
const SECOND: Readonly<Record<Loss, readonly Loss[]>> = {
  strict: ['strict', 'ext4', 'death'],
  ext4: ['ext4', 'death'],
  away: ['strict', 'death'],
  death: ['death'],
};

export interface Progress {
  /** Workloads that are done. */
  workloads: number;
  /** States checked, all distinct within their workload. */
  states: number;
  /** States that were the same as one before, and not checked again. */
  repeated: number;
  /** By kind of loss; 'second' counts second crashes. */
  readonly kinds: Record<string, number>;
}

export interface Failure {
  readonly state: string;
  readonly error: Error;
}

export interface EnumerateOptions {
  readonly seed: string;
  readonly place: string;
  /** Stop when so many states were checked. */
  readonly states: number;
  /** The first workload. */
  readonly from?: number;
  readonly liesAbout?: WorkloadOptions['liesAbout'];
  readonly takesBackups?: boolean;
  /** Called after each workload. */
  readonly done?: (progress: Progress) => void;
  /** Called for each failing state; returns whether to go on. */
  readonly failed: (failure: Failure) => boolean;
}

export function newProgress(): Progress {
  return { workloads: 0, states: 0, repeated: 0, kinds: {} };
}

export async function enumerate(options: EnumerateOptions, progress = newProgress()): Promise<Progress> {
  for (let number = options.from ?? progress.workloads; progress.states < options.states; number++) {
    let workload: Workload;
    try {
      workload = await record({ ...options, number });
    } catch (error) {
      if (!options.failed({ state: `${options.seed}/${number}`, error: error as Error })) return progress;
      progress.workloads++;
      continue;
    }
    if (!(await checkWorkload(workload, options, progress))) return progress;
    progress.workloads++;
    options.done?.(progress);
  }
  return progress;
}

/** False: stop. */
async function checkWorkload(workload: Workload, options: EnumerateOptions, progress: Progress): Promise<boolean> {
  const seen = new Set<string>();
  const random = new Random(`${workload.label}/order`);
  const all = (workload.end - workload.start) * CHOICES_PER_MOMENT;
  // In an order of its own, so that a run that ends early has looked everywhere.
  const order = dangerousFirst(shuffled(all, random), workload);
  const enough = Math.min(options.states, progress.states + STATES_PER_WORKLOAD);
  for (const at of order) {
    if (progress.states >= enough) return true;
    const name = `${workload.label}/${workload.start + Math.floor(at / CHOICES_PER_MOMENT) + 1}/${at % CHOICES_PER_MOMENT}`;
    let kind: string | undefined;
    try {
      kind = await inTime(checkOne(workload, name, options.place, seen));
    } catch (error) {
      const goesOn = options.failed({ state: name, error: described(error as Error, workload) });
      // What hangs still uses the place.
      if (!goesOn || error instanceof Hangs) return false;
      kind = 'violation';
    }
    if (kind === undefined) progress.repeated++;
    else {
      progress.states++;
      progress.kinds[kind] = (progress.kinds[kind] ?? 0) + 1;
    }
  }
  return true;
}

class Hangs extends Violation {}

/** Errors: Hangs. */
async function inTime<T>(check: Promise<T>): Promise<T> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new Hangs(`not done after ${STATE_MS} ms`)), STATE_MS);
  });
  try {
    return await Promise.race([check, late]);
  } finally {
    clearTimeout(timer);
  }
}

function described(error: Error, { story }: Workload): Error {
  const what = error instanceof Violation ? error.message : (error.stack ?? String(error));
  return new Violation(`${what}\n  ${story.join('\n  ')}`, { cause: error });
}

/** The state with that name, once more; or only the recording, if the name ends with the workload. */
export async function replay(
  name: string,
  options: Omit<EnumerateOptions, 'seed' | 'failed' | 'states'>,
): Promise<string> {
  const [seed = '', number, ...state] = name.split('/');
  const workload = await record({ ...options, seed, number: Number(number) });
  if (state.length === 0) return 'recorded';
  try {
    return (await checkOne(workload, name, options.place, new Set())) ?? '';
  } catch (error) {
    throw described(error as Error, workload);
  }
}

/** Returns its kind; undefined if it has been seen. */
async function checkOne(
  workload: Workload,
  name: string,
  place: string,
  seen: Set<string>,
): Promise<string | undefined> {
  const random = new Random(name);
  const at = Number(name.split('/').at(-2));
  const loss = random.weighted<Loss>(LOSSES);
  const files = crashFiles(workload, at, loss, random);
  const { model } = workload;
  const { canPunchHole, canZeroRange, canClone } = workload.machine.options;
  const abilities = { canPunchHole, canZeroRange, canClone };
  const machine = { ...after(loss, workload.machine.options), ...abilities } as State['machine'];
  const state: State = { files, model, at, loss, machine, place, random };
  if (!random.chance(SECOND_CRASH)) {
    if (!isNew(seen, `${loss} ${at} ${digestOf(files)}`)) return undefined;
    await named(loss, () => checkState(state));
    return loss;
  }
  const recovery = await named(loss, () => recover(state));
  const recording = { before: files, inodes: recovery.inodes, journal: recovery.journal };
  const second = random.pick(SECOND[loss]);
  const secondFiles = crashFiles(recording, random.below(recovery.journal.now + 1), second, random);
  if (!isNew(seen, `${loss} ${second} ${at} ${digestOf(secondFiles)}`)) return undefined;
  const kind = `${loss}, then ${second}`;
  const next = { ...after(second, machine), ...abilities } as State['machine'];
  await named(kind, () => checkState({ ...state, files: secondFiles, machine: next }));
  return kind;
}

/** Errors say what kind of crash it was. */
async function named<T>(kind: string, work: () => Promise<T>): Promise<T> {
  try {
    return await work();
  } catch (error) {
    (error as Error).message = `(${kind}) ${(error as Error).message}`;
    throw error;
  }
}

function isNew(seen: Set<string>, key: string): boolean {
  if (seen.has(key)) return false;
  seen.add(key);
  return true;
}

/** Inode numbers stay as they were in all cases: logs must not rely on a change of them after a power loss. */
function after(loss: Loss, { bootId, mounting }: Identity): Identity {
  if (loss === 'death') return { bootId, mounting };
  if (loss === 'away') return { bootId, mounting: `${mounting} more` };
  return { bootId: `${bootId} and another`, mounting };
}

/**
 * Every second place is for moments at which something is lost for good: a name was removed, a hole was punched, a file was cut,
 * a moment ago. They are few, and what is removed too early is seen only there.
 */
function dangerousFirst(order: readonly number[], { journal, start }: Workload): number[] {
  const dangerous = new Set<number>();
  for (const event of journal.events) {
    const removes = event.type === 'name' && event.changes.some(({ ino }) => ino === undefined);
    if (!removes && !(event.type === 'data' && event.isMetadata)) continue;
    for (let at = event.at; at < event.at + DANGEROUS_MOMENTS; at++) dangerous.add(at - start - 1);
  }
  const isDangerous = (at: number): boolean => dangerous.has(Math.floor(at / CHOICES_PER_MOMENT));
  const first = order.filter(isDangerous);
  const rest = order.filter((at) => !isDangerous(at));
  const mixed: number[] = [];
  for (let n = 0; n < Math.max(first.length, rest.length); n++)
    mixed.push(...first.slice(n, n + 1), ...rest.slice(n, n + 1));
  return mixed;
}

function shuffled(count: number, random: Random): number[] {
  const order = Array.from({ length: count }, (_, n) => n);
  for (let at = count - 1; at > 0; at--) {
    const other = random.below(at + 1);
    [order[at], order[other]] = [order[other] as number, order[at] as number];
  }
  return order;
}
