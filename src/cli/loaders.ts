/**
 * Loads the command that is asked for and not the others: reading their modules takes longer than most commands do. Owns
 * the decision which that is; what cannot be told from the first word (help, options, a name that is wrong) loads them all.
 */
import type { Command } from 'commander';

/** By name, in the order in which help lists them. `words`: what follows the command's name. */
export type Loaders = Readonly<Record<string, (words: readonly string[]) => Promise<Command>>>;

/** Add to `parent` the commands that `words`, what follows its name on the command line, can mean. */
export async function addCommands(parent: Command, loaders: Loaders, words: readonly string[]): Promise<Command> {
  const [name, ...rest] = words;
  const asked = name !== undefined && Object.hasOwn(loaders, name) ? loaders[name] : undefined;
  if (asked) return parent.addCommand(await asked(rest));
  for (const load of Object.values(loaders)) parent.addCommand(await load([]));
  return parent;
}
