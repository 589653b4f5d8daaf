/** `sheepgate vdi`: the group of commands about VDIs and snapshots. */
import { Command } from 'commander';
import { vdiCloneCommand } from './vdi-clone.js';
import { vdiCreateCommand } from './vdi-create.js';
import { vdiDeleteCommand } from './vdi-delete.js';
import { vdiListCommand } from './vdi-list.js';
import { vdiResizeCommand } from './vdi-resize.js';
import { vdiRollbackCommand } from './vdi-rollback.js';
import { vdiShowCommand } from './vdi-show.js';
import { vdiSnapshotCommand } from './vdi-snapshot.js';
import { vdiTreeCommand } from './vdi-tree.js';

export function vdiCommand(): Command {
  return new Command('vdi')
    .description('create, list, snapshot, clone and delete VDIs')
    .addCommand(vdiCreateCommand())
    .addCommand(vdiListCommand())
    .addCommand(vdiShowCommand())
    .addCommand(vdiTreeCommand())
    .addCommand(vdiDeleteCommand())
    .addCommand(vdiResizeCommand())
    .addCommand(vdiSnapshotCommand())
    .addCommand(vdiCloneCommand())
    .addCommand(vdiRollbackCommand());
}
