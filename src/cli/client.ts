/** `sheepgate client`: the group of commands about the NBD clients of a daemon. */
import { Command } from 'commander';
import { addCommands, type Loaders } from './loaders.js';

const COMMANDS: Loaders = {
  list: async () => (await import('./client-list.js')).clientListCommand(),
  disconnect: async () => (await import('./client-disconnect.js')).clientDisconnectCommand(),
};

/** `words`: what follows `client` on the command line. */
export async function clientCommand(words: readonly string[]): Promise<Command> {
  const command = new Command('client').description('list and disconnect the NBD clients of a daemon');
  return addCommands(command, COMMANDS, words);
}
