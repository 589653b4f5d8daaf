/** `sheepgate store`: the group of commands about a local store as a whole. */
import { Command } from 'commander';
import { addCommands, type Loaders } from './loaders.js';

const COMMANDS: Loaders = {
  rescue: async () => (await import('./store-rescue.js')).storeRescueCommand(),
};

/** `words`: what follows `store` on the command line. */
export async function storeCommand(words: readonly string[]): Promise<Command> {
  const command = new Command('store').description('build a store from what is left of a damaged one');
  return addCommands(command, COMMANDS, words);
}
