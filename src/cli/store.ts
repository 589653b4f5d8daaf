/** `sheepgate store`: the group of commands about a local store as a whole. */
import { Command } from 'commander';
import { addCommands, type Loaders } from './loaders.js';

const COMMANDS: Loaders = {
  merging: async () => (await import('./store-merging.js')).storeMergingCommand(),
  rescue: async () => (await import('./store-rescue.js')).storeRescueCommand(),
};

/** `words`: what follows `store` on the command line. */
export async function storeCommand(words: readonly string[]): Promise<Command> {
  const command = new Command('store').description('background work of a local store; rescue of a damaged one');
  return addCommands(command, COMMANDS, words);
}
