/** `sheepgate vdi lock`: lists the locks of a cluster's nodes, and removes one that was left behind. */
import { Command, Option } from 'commander';
import type { LockStatus } from '../operations/operations.js';
import { io } from './command-io.js';
import { withCommonOptions, withOperations, type CommonOptions } from './common-options.js';
import { formatVid, printJson, printLine, printNote, table } from './output.js';

const NOT_ENFORCED =
  "this cluster was formatted without locks ('dog cluster format -l'), so it does not prevent a second writer";

const LIST_HELP = `
LOCKED THROUGH is the node that took the lock for a client. The node does not know which client that was, nor whether it is
still connected: when a node ends, its clients continue through other nodes, and the lock stays. OPEN HERE shows the clients
of this machine's daemons that have the VDI open; clients of other machines are not shown.

Example:
  sheepgate vdi lock list --cluster node1`;

const UNLOCK_HELP = `
A VDI with two writers is lost. So first make sure that the client that locked it has ended: check the machines that use the
node shown by 'vdi lock list', and the machines that may have continued through another node. Then name that node.

Example:
  sheepgate vdi lock unlock vm1 --held-by 10.0.0.3:7000 --cluster node1`;

export function vdiLockCommand(): Command {
  return new Command('lock')
    .description("list a cluster's locks of VDIs, and remove a lock that was left behind")
    .addCommand(listCommand())
    .addCommand(unlockCommand());
}

function listCommand(): Command {
  const command = new Command('list')
    .description('list the locked VDIs, and the nodes that hold the locks')
    .addHelpText('after', LIST_HELP);
  return withCommonOptions(command).action(async (options: CommonOptions) => {
    const { areEnforced, locks } = await withOperations(options, (operations) => operations.locks());
    if (!areEnforced) printNote(NOT_ENFORCED);
    if (options.json) return printJson(locks.map(lockJson));
    const rows = locks.map((lock) => [
      lock.name ?? (lock.isDeleted ? '(deleted)' : '(unreadable)'),
      lock.tag ?? '',
      formatVid(lock.vid),
      lock.kind,
      lock.holders.map(({ node, isMember }) => (isMember ? node : `${node} (no longer a member)`)).join(', '),
      lock.usedBy.length === 0 ? 'no' : `by ${lock.usedBy.join('; ')}`,
    ]);
    io().stdout.write(table(['NAME', 'TAG', 'ID', 'KIND', 'LOCKED THROUGH', 'OPEN HERE'], rows, ['ID']));
  });
}

function unlockCommand(): Command {
  const command = new Command('unlock')
    .description('remove a lock that was left behind')
    .argument('<vdi>', 'NAME, NAME@TAG for a snapshot, or @ID')
    .addOption(
      new Option(
        '--held-by <node>',
        'HOST:PORT of the node that holds the lock; confirms that no client writes this VDI, through this node or another',
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
