/**
 * Loads only the command that is called: loading the modules of all commands takes longer than most commands run. Owns the
 * decision which command that is. Help, options and unknown names load all of them.
 */
import type { Command } from 'commander';

/** By name, in the order of the help. `words`: the words after the command's name. */
export type Loaders = Readonly<Record<string, (words: readonly string[]) => Promise<Command>>>;

/** Add to `parent` the command that `words` (the words after its name on the command line) call, or all commands. */
export async function addCommands(parent: Command, loaders: Loaders, words: readonly string[]): Promise<Command> {
  const [name, ...rest] = words;
  const asked = name !== undefined && Object.hasOwn(loaders, name) ? loaders[name] : undefined;
  if (asked) return parent.addCommand(await asked(rest));
  for (const load of Object.values(loaders)) parent.addCommand(await load([]));
  return parent;
}
