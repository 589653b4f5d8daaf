/**
 * The command line: the tree of commands, and how each of them ends. Owns the exit codes (0 done, 1 failed with one line on
 * stderr, 2 wrong usage) and the form of error messages. Each command is a file of its own. Never ends the process, and takes
 * none of its signals: that is for main.ts.
 */
import { Command, CommanderError } from 'commander';
import { asOperationError, type OperationError } from '../operations/operations.js';
import { isSystemError, systemMessage } from '../system/system-error.js';
import { io, withIo, type CommandIo } from './command-io.js';
import { finish, lastWords } from './ending.js';
import { InterruptedError } from '../system/interrupted-error.js';
import { addCommands, type Loaders } from './loaders.js';
import { missingPart } from './load-failure.js';
import { printable } from '../text/printable.js';
import { readableStack } from '../system/readable-stack.js';
import { version } from './version.js';

export const EXIT_FAILED = 1;
const EXIT_USAGE = 2;
/** Codes of a full disk, from a store and from a daemon. */
const SPACE_CODES = new Set(['NO_SPACE', 'ENOSPC']);

/** Options that commander answers by itself. */
const VERSION_OPTIONS = new Set(['--version', '-V']);

const COMMANDS: Loaders = {
  serve: async () => (await import('./serve.js')).serveCommand(),
  reload: async () => (await import('./reload.js')).reloadCommand(),
  vdi: async (words) => (await import('./vdi.js')).vdiCommand(words),
  client: async (words) => (await import('./client.js')).clientCommand(words),
  import: async () => (await import('./import.js')).importCommand(),
  export: async () => (await import('./export.js')).exportCommand(),
  backup: async () => (await import('./backup.js')).backupCommand(),
  restore: async () => (await import('./restore.js')).restoreCommand(),
  migrate: async () => (await import('./migrate.js')).migrateCommand(),
  store: async (words) => (await import('./store.js')).storeCommand(words),
  check: async () => (await import('./check.js')).checkCommand(),
  cluster: async () => (await import('./cluster.js')).clusterCommand(),
  node: async () => (await import('./cluster.js')).nodeCommand(),
};

const EXAMPLES = `
Examples:
  sheepgate serve --create vm1:20G          serve a thin 20 GiB disk until Ctrl-C
  sheepgate vdi snapshot vm1 monday         works while vm1 is in use
  sheepgate export vm1@monday monday.img
  sheepgate backup vm1 --to /backup/vm1     a full backup first, then only changes
  sheepgate vdi delete vm1@monday`;

async function programme(words: readonly string[]): Promise<Command> {
  const program = new Command('sheepgate')
    .description('NBD server for Sheepdog virtual disks (VDIs): thin, snapshotable disks for any NBD client')
    .version(version());
  if (words[0] === undefined || !VERSION_OPTIONS.has(words[0])) await addCommands(program, COMMANDS, words);
  program.addHelpText('after', EXAMPLES);
  throwInsteadOfExiting(program);
  return program;
}

/** commander would exit with 1 for wrong usage. Its settings are not inherited by commands that are added later. */
function throwInsteadOfExiting(command: Command): void {
  command.exitOverride();
  command.showSuggestionAfterError(true);
  command.configureOutput({
    writeOut: (text) => void io().stdout.write(text),
    writeErr: (text) => void io().stderr.write(text),
    outputError: (text) => lastWords(`${oneLine(text.replace(/^error: /, 'sheepgate: ').trimEnd())}\n`),
  });
  for (const child of command.commands) throwInsteadOfExiting(child);
}

/** Print the line for an error that a command threw; returns the exit code. */
function endWith(error: unknown): number {
  if (error instanceof CommanderError) return error.exitCode === 0 ? 0 : EXIT_USAGE; // commander has printed it
  if (error instanceof InterruptedError) {
    lastWords(`sheepgate: ${error.message}\n`);
    return error.exitCode;
  }
  const expected = asOperationError(error);
  if (expected) {
    lastWords(`sheepgate: ${oneLine(withWayOut(expected))}\n`);
    return expected.code === 'BAD_USAGE' ? EXIT_USAGE : EXIT_FAILED;
  }
  if (isSystemError(error)) {
    lastWords(`sheepgate: ${oneLine(systemMessage(error))}\n`);
    return EXIT_FAILED;
  }
  const missing = missingPart(error);
  if (missing !== undefined) {
    lastWords(`sheepgate: ${oneLine(missing)}\n`);
    return EXIT_FAILED;
  }
  lastWords(`sheepgate: internal error, please report it: ${readableStack(error)}\n`);
  return EXIT_FAILED;
}

/** The message of an error. If the disk is full, it also says what to do. */
function withWayOut({ code, message }: OperationError): string {
  if (!SPACE_CODES.has(code) || message.includes('; ')) return message;
  return `${message}; free space on that filesystem, or delete VDIs and snapshots that are not needed`;
}

function oneLine(text: string): string {
  return printable(text.replaceAll(/\s*\n\s*/g, ' '));
}

export interface Ending {
  readonly code: number;
  /** What the command threw; undefined if it did its work. */
  readonly error?: unknown;
}

/** Run a command of the words after `sheepgate`. Every error is printed. */
export async function runWords(words: readonly string[]): Promise<Ending> {
  let ending: Ending;
  try {
    await (await programme(words)).parseAsync(words, { from: 'user' });
    ending = { code: io().exitCode };
  } catch (error) {
    ending = { code: endWith(error), error };
  }
  await finish(ending.code);
  return ending;
}

/**
 * Run a command inside another program, with streams and an environment of its own; returns its exit code. Not for `serve`, nor
 * for commands with --freeze-cmd, whose output goes to the stderr of the process.
 */
export async function runCommand(words: readonly string[], those: Omit<CommandIo, 'takesSignals'>): Promise<number> {
  return withIo({ ...those, takesSignals: false }, async () => (await runWords(words)).code);
}
