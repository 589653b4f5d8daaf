/**
 * The options of every command: the store, its daemon, and the form of the output. Owns how parsed options become Operations,
 * and that these are closed.
 */
import fs from 'node:fs';
import path from 'node:path';
import { InvalidArgumentError, Option, type Command } from 'commander';
import { OperationError, type Operations } from '../operations/operations.js';
import { defaultStore } from '../operations/default-paths.js';
import { CLUSTER, type StoreOptions } from '../store/locations.js';
import { closeAfter } from '../system/close-after.js';
import { io } from './command-io.js';
import { printNote } from './output.js';
import { parseSize, SizeError } from '../text/size.js';

export interface CommonOptions {
  readonly store?: string;
  /** The location of a cluster. */
  readonly cluster?: string;
  readonly control?: string;
  readonly json?: boolean;
}

/** Add --store, --cluster, --control and --json. */
export function withCommonOptions(command: Command): Command {
  return command
    .addOption(
      new Option('--store <dir>', `local store (default: $SHEEPGATE_STORE or ${defaultStore(io().env)})`).argParser(
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

/** --force, for commands that replace or delete a VDI or snapshot. */
export function forceOption(): Option {
  return new Option(
    '--force',
    'act even if a disconnected client may still come back and use it; make sure that it will not',
  );
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
  /** The operator named the store, so a daemon of another store is an error. */
  readonly isStoreGiven: boolean;
  readonly control: string | undefined;
}

/** The store that the options name, or else the environment. Errors: NO_STORE. */
export function chosenStore(options: CommonOptions, env: NodeJS.ProcessEnv = io().env): ChosenStore {
  if (options.cluster !== undefined) return { store: options.cluster, isStoreGiven: true, control: options.control };
  const given = options.store ?? (env.SHEEPGATE_STORE || undefined);
  // The control socket in the environment belongs to the store in the environment.
  const control = options.control ?? ((options.store === undefined && env.SHEEPGATE_CONTROL) || undefined);
  const store = path.resolve(given ?? defaultStore(env));
  if (fs.statSync(store, { throwIfNoEntry: false })?.isDirectory() === false) {
    throw new OperationError(
      'NO_STORE',
      `${store} is not a directory, so it cannot be a store; give another one with --store DIR`,
    );
  }
  return { store, isStoreGiven: given !== undefined, control };
}

/**
 * Run `work` on the store that the options name, through its daemon if it has one. Without `mayCreate` the store must exist, so
 * that a mistyped directory is an error and not an empty store. Errors: those of openOperations and of `work`.
 */
export async function withOperations<T>(
  options: CommonOptions,
  work: (operations: Operations) => Promise<T>,
  { mayCreate = false, store }: { readonly mayCreate?: boolean; readonly store?: StoreOptions } = {},
): Promise<T> {
  const place = chosenStore(options);
  // Loaded late: loading a store's native libraries takes a while, and usage errors and --help do not need them.
  const { openOperations } = await import('../operations/open-operations.js');
  // Loaded before the store is opened: with the identity of its owner this process may not be able to read its own program.
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

/** A note is printed once, even if the command opens its store several times. */
function noteOnce(line: string): void {
  const { noted } = io();
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
