/** `sheepgate vdi tree`: VDIs and snapshots below their parents, like `dog vdi tree`. */
import { labelOfVdi } from '../store/vdi-record.js';
import { Command } from 'commander';
import type { VdiRecord } from '../operations/operations.js';
import { withCommonOptions, withOperations, type CommonOptions } from './common-options.js';
import { damagedJson, formatTime, formatVid, otherSpec, printJson, printLine, vdiJson } from './output.js';

export interface TreeNode {
  readonly vdi: VdiRecord;
  readonly children: readonly TreeNode[];
}

/** The oldest roots first; a VDI whose parent is gone is a root. */
export function treeOf(vdis: readonly VdiRecord[]): TreeNode[] {
  const known = new Set(vdis.map((vdi) => vdi.vid));
  const byParent = new Map<number, VdiRecord[]>();
  for (const vdi of vdis) {
    const parent = known.has(vdi.parentVid) && vdi.parentVid !== vdi.vid ? vdi.parentVid : 0;
    const siblings = byParent.get(parent);
    if (siblings) siblings.push(vdi);
    else byParent.set(parent, [vdi]);
  }
  const nodesUnder = (vid: number): TreeNode[] =>
    (byParent.get(vid) ?? [])
      .sort((a, b) => a.createdAt - b.createdAt || Number(b.isSnapshot) - Number(a.isSnapshot) || a.vid - b.vid)
      .map((vdi) => ({ vdi, children: nodesUnder(vdi.vid) }));
  return nodesUnder(0);
}

/**
 * One line per VDI. The history of a name goes straight down, and branches of a snapshot are indented below it, so that a hundred
 * snapshots in a row are not indented.
 */
export function treeLines(roots: readonly TreeNode[]): string[] {
  const lines: string[] = [];
  const chain = (start: TreeNode, indent: string, isLastBranch: boolean | undefined): void => {
    const mark = isLastBranch === undefined ? '' : isLastBranch ? '└─ ' : '├─ ';
    const below = isLastBranch === undefined ? '' : isLastBranch ? '   ' : '│  ';
    let node: TreeNode | undefined = start;
    let prefix = indent + mark;
    while (node) {
      const { vdi, children }: TreeNode = node;
      // The newest continuation of the same name is the main line: a rollback leaves the older one as a branch.
      const next: TreeNode | undefined = vdi.isSnapshot
        ? children.findLast((child) => child.vdi.name === vdi.name)
        : undefined;
      lines.push(`${prefix}${describe(vdi)}`);
      const branches = children.filter((child) => child !== next);
      branches.forEach((child, i) => {
        chain(child, `${indent}${below}${next ? '│  ' : ''}`, i === branches.length - 1);
      });
      prefix = `${indent}${below}`;
      node = next;
    }
  };
  for (const root of roots) chain(root, '', undefined);
  return lines;
}

function describe(vdi: VdiRecord): string {
  const spec = otherSpec(vdi);
  const said = spec === undefined ? '' : `  ${spec}`;
  if (vdi.isSnapshot) return `${labelOfVdi(vdi)}${said}  [${formatTime(vdi.snapshotAt)}]`;
  return `${vdi.name}${said}  (you are here${vdi.unfinished ? `, unfinished ${vdi.unfinished.by}` : ''})`;
}

function nodeJson(node: TreeNode): object {
  return { ...vdiJson(node.vdi), children: node.children.map(nodeJson) };
}

export function vdiTreeCommand(): Command {
  const command = new Command('tree')
    .description('show VDIs and snapshots as a tree, each below its parent')
    .addHelpText('after', '\nExample:\n  sheepgate vdi tree');
  return withCommonOptions(command).action(async (options: CommonOptions) => {
    const { vdis, damaged } = await withOperations(options, async (operations) => ({
      vdis: await operations.list(),
      damaged: await operations.listDamaged(),
    }));
    const roots = treeOf(vdis);
    if (options.json) return printJson([...roots.map(nodeJson), ...damaged.map(damagedJson)]);
    for (const line of treeLines(roots)) printLine(line);
    for (const { vid, likelyName, why } of damaged) {
      const name = likelyName === undefined ? '' : `(${likelyName}?)  `;
      printLine(`${name}${formatVid(vid)}  [damaged: ${why}]`);
    }
  });
}
