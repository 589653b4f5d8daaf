/**
 * The options that every command has, and what they mean: which store, through which daemon, for people or machines.
 * Owns the way from parsed options to Operations and back to the end of the process's work on them.
 */
import fs from 'node:fs';
import path from 'node:path';
import { InvalidArgumentError, Option, type Command } from 'commander';
import { OperationError, type Operations } from '../operations/operations.js';
import { defaultStore } from '../operations/default-paths.js';
import { CLUSTER, type StoreOptions } from '../store/locations.js';
import { closeAfter } from '../system/close-after.js';
import { printNote } from './output.js';
import { parseSize, SizeError } from '../text/size.js';

export interface CommonOptions {
  readonly store?: string;
  /** Its location. */
  readonly cluster?: string;
  readonly control?: string;
  readonly json?: boolean;
}

/** Add --store, --cluster, --control and --json. */
export function withCommonOptions(command: Command): Command {
  return command
    .addOption(
      new Option('--store <dir>', `local store (default: $SHEEPGATE_STORE or ${defaultStore()})`).argParser(
        notEmpty('--store', 'a directory'),
      ),
    )
    .addOption(
      new Option('--cluster <nodes>', `Sheepdog cluster, ${CLUSTER.syntax}, instead of a local store`)
        .argParser(clusterArgument)
        .conflicts('store'),
    )
    .addOption(
      new Option(
        '--control <path>',
        "daemon's control socket (default: $SHEEPGATE_CONTROL or STORE/control.sock)",
      ).argParser(notEmpty('--control', 'a path')),
    )
    .option('--json', 'print JSON');
}

/** --force, of commands that replace something or take it away. */
export function forceOption(): Option {
  return new Option('--force', 'also if a client that was cut off from it may come back: it will not');
}

function notEmpty(option: string, what: string): (value: string) => string {
  return (value) => {
    if (value === '' || value.includes('\0')) throw new InvalidArgumentError(`${option} needs ${what}.`);
    return value;
  };
}

function clusterArgument(text: string): string {
  try {
    return CLUSTER.parse(text);
  } catch (error) {
    throw new InvalidArgumentError(`${(error as Error).message}.`);
  }
}

export interface ChosenStore {
  /** A directory, or a cluster's location. */
  readonly store: string;
  /** The store was asked for by name, so nothing but this one will do. */
  readonly isStoreGiven: boolean;
  readonly control: string | undefined;
}

/** The store the options and the environment name. What is on the command line wins. Errors: NO_STORE. */
export function chosenStore(options: CommonOptions, env: NodeJS.ProcessEnv = process.env): ChosenStore {
  if (options.cluster !== undefined) return { store: options.cluster, isStoreGiven: true, control: options.control };
  const given = options.store ?? (env.SHEEPGATE_STORE || undefined);
  // The control socket in the environment belongs to the store in the environment.
  const control = options.control ?? ((options.store === undefined && env.SHEEPGATE_CONTROL) || undefined);
  const store = path.resolve(given ?? defaultStore(env));
  if (fs.statSync(store, { throwIfNoEntry: false })?.isDirectory() === false) {
    throw new OperationError('NO_STORE', `${store} is not a directory, so it is no store; --store DIR names another`);
  }
  return { store, isStoreGiven: given !== undefined, control };
}

/**
 * Run `work` on the store that the options name, through its daemon if it has one. Without `mayCreate` there must be a
 * store: a mistyped directory is an error, not an empty store.
 */
export async function withOperations<T>(
  options: CommonOptions,
  work: (operations: Operations) => Promise<T>,
  { mayCreate = false, store }: { readonly mayCreate?: boolean; readonly store?: StoreOptions } = {},
): Promise<T> {
  const place = chosenStore(options);
  // Loaded late: the store's native parts take a while, and usage errors and --help need none of them.
  const { openOperations } = await import('../operations/open-operations.js');
  // Before the store is opened: as its owner this process may not be able to read its own program.
  const { explainIdentity } = await import('../operations/run-as-owner.js');
  const operations = await openOperations({
    ...place,
    mayCreate,
    options: store,
    log: noteOnce,
  });
  return closeAfter(operations, async () => {
    try {
      return await work(operations);
    } catch (error) {
      throw explainIdentity(error);
    }
  });
}

const noted = new Set<string>();

/** A command that opens its store several times says what it finds there once. */
function noteOnce(line: string): void {
  if (!noted.has(line)) printNote(line);
  noted.add(line);
}

/** For commander: a size argument. */
export function sizeArgument(text: string): number {
  try {
    return parseSize(text);
  } catch (error) {
    if (!(error instanceof SizeError)) throw error;
    throw new InvalidArgumentError(error.message);
  }
}
