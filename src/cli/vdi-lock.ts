/** `sheepgate vdi lock`: lists the locks of a cluster's nodes, and removes one that was left behind. */
import { Command, Option } from 'commander';
import type { LockStatus } from '../operations/operations.js';
import { io } from './command-io.js';
import { withCommonOptions, withOperations, type CommonOptions } from './common-options.js';
import { formatVid, printJson, printLine, printNote, table } from './output.js';

const NOT_ENFORCED =
  "this cluster was formatted without locks ('dog cluster format -l'), so it keeps no second writer out";

const LIST_HELP = `
LOCKED THROUGH is the node that was asked for the lock. It does not know which client that was, nor whether it is still there:
a client goes on through another node when its own one ends, and the lock stays as it is. OPEN HERE says who has it open
through daemons of this machine; of other machines nothing is known.

Example:
  sheepgate vdi lock list --cluster node1`;

const UNLOCK_HELP = `
A VDI that is locked twice is written by two, and lost. So first make sure that whoever locked it has ended: look at the machines
of the node that 'vdi lock list' shows, and at those that may have gone on without it. Then say which node's lock it is.

Example:
  sheepgate vdi lock unlock vm1 --held-by 10.0.0.3:7000 --cluster node1`;

export function vdiLockCommand(): Command {
  return new Command('lock')
    .description("look at a cluster's locks of VDIs, and end one that was left behind")
    .addCommand(listCommand())
    .addCommand(unlockCommand());
}

function listCommand(): Command {
  const command = new Command('list')
    .description('list what is locked, and through which node')
    .addHelpText('after', LIST_HELP);
  return withCommonOptions(command).action(async (options: CommonOptions) => {
    const { areEnforced, locks } = await withOperations(options, (operations) => operations.locks());
    if (!areEnforced) printNote(NOT_ENFORCED);
    if (options.json) return printJson(locks.map(lockJson));
    const rows = locks.map((lock) => [
      lock.name ?? (lock.isDeleted ? '(deleted)' : '(not readable)'),
      lock.tag ?? '',
      formatVid(lock.vid),
      lock.kind,
      lock.holders.map(({ node, isMember }) => (isMember ? node : `${node} (no member any more)`)).join(', '),
      lock.usedBy.length === 0 ? 'no' : `by ${lock.usedBy.join('; ')}`,
    ]);
    io().stdout.write(table(['NAME', 'TAG', 'ID', 'KIND', 'LOCKED THROUGH', 'OPEN HERE'], rows, ['ID']));
  });
}

function unlockCommand(): Command {
  const command = new Command('unlock')
    .description('end a lock that somebody has left behind')
    .argument('<vdi>', 'NAME, NAME@TAG for a snapshot, or @ID')
    .addOption(
      new Option(
        '--held-by <node>',
        'HOST:PORT of the node whose lock it is: nobody writes there any more, nor elsewhere',
      ),
    )
    .addHelpText('after', UNLOCK_HELP);
  return withCommonOptions(command).action(async (spec: string, options: CommonOptions & { heldBy?: string }) => {
    const { heldBy } = options;
    const lock = await withOperations(options, (operations) => operations.unlock(spec, { heldBy }));
    if (options.json) return printJson(lockJson(lock));
    const through = heldBy ?? lock.holders.map(({ node }) => node).join(', ');
    printLine(`unlocked ${spec} (id ${formatVid(lock.vid)}), which was locked through ${through}`);
  });
}

function lockJson({ vid, name, tag, isSnapshot, isDeleted, kind, holders, usedBy }: LockStatus): object {
  return {
    ...{ name, tag, vid, isSnapshot, isDeleted, kind },
    holders: holders.map(({ node, isMember }) => ({ node, isMember })),
    usedBy,
  };
}
