/** `sheepgate vdi`: the group of commands about VDIs and snapshots. */
import { Command } from 'commander';
import { addCommands, type Loaders } from './loaders.js';

const COMMANDS: Loaders = {
  create: async () => (await import('./vdi-create.js')).vdiCreateCommand(),
  list: async () => (await import('./vdi-list.js')).vdiListCommand(),
  show: async () => (await import('./vdi-show.js')).vdiShowCommand(),
  tree: async () => (await import('./vdi-tree.js')).vdiTreeCommand(),
  delete: async () => (await import('./vdi-delete.js')).vdiDeleteCommand(),
  resize: async () => (await import('./vdi-resize.js')).vdiResizeCommand(),
  snapshot: async () => (await import('./vdi-snapshot.js')).vdiSnapshotCommand(),
  clone: async () => (await import('./vdi-clone.js')).vdiCloneCommand(),
  rollback: async () => (await import('./vdi-rollback.js')).vdiRollbackCommand(),
  lock: async () => (await import('./vdi-lock.js')).vdiLockCommand(),
};

/** `words`: what follows `vdi` on the command line. */
export async function vdiCommand(words: readonly string[]): Promise<Command> {
  const command = new Command('vdi').description('create, list, snapshot, clone and delete VDIs');
  return addCommands(command, COMMANDS, words);
}
