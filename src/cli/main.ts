/**
 * The command line: the tree of commands, and how each of them ends. Owns the exit codes (0 done, 1 failed with one line on
 * stderr, 2 wrong usage) and the form of error messages. Each command is a file of its own.
 */
import { Command, CommanderError } from 'commander';
import { asOperationError, type OperationError } from '../operations/operations.js';
import { isSystemError, reasonOf, systemMessage } from '../system/system-error.js';
import { finish, lastWords } from './ending.js';
import { endBySignal } from '../system/end-by-signal.js';
import { InterruptedError } from '../system/interrupted-error.js';
import { addCommands, type Loaders } from './loaders.js';
import { missingPart } from './load-failure.js';
import { printable } from '../text/printable.js';
import { readableStack } from '../system/readable-stack.js';
import { version } from './version.js';

const EXIT_FAILED = 1;
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

// `sheepgate vdi list | head`: a reader that stops reading is no error. Commands that write more than lines to stdout (an image)
// have listeners of their own.
process.stdout.on('error', (error: NodeJS.ErrnoException) => {
  if (process.stdout.listenerCount('error') > 1) return;
  if (error.code === 'EPIPE') process.exit(process.exitCode ?? 0);
  process.stderr.write(`sheepgate: cannot write to stdout: ${reasonOf(error)}\n`);
  process.exit(EXIT_FAILED);
});
// A note that cannot be written does not end the command.
process.stderr.on('error', () => undefined);
// An internal error ends the process by a signal: Node's own exit can wait for ever (see endBySignal).
process.on('uncaughtException', (error) => {
  process.stderr.write(`sheepgate: internal error, please report it: ${readableStack(error)}\n`);
  endBySignal('SIGABRT');
});

let isOver = false;
// Node has nothing left to do, but the command has not ended: that must not look like success.
process.once('beforeExit', () => {
  if (isOver) return;
  process.stderr.write('sheepgate: internal error, please report it: the command stopped before it was done\n');
  process.exit(EXIT_FAILED);
});

async function main(): Promise<void> {
  try {
    await (await programme(process.argv.slice(2))).parseAsync();
    await finish(Number(process.exitCode ?? 0));
    isOver = true;
  } catch (error) {
    const code = endWith(error);
    await finish(code);
    isOver = true;
    // Output that is still buffered for a pipe is written first, except for an interrupted image.
    if (error instanceof InterruptedError) process.exit(code);
    if (process.stdout.writableLength > 0) process.stdout.once('drain', () => process.exit(code));
    else process.exitCode = code;
  }
}

void main();
