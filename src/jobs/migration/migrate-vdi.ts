/** A migration of a VDI however the operator writes its name. Owns what it is called on both sides. */
import { OperationError, type Operations } from '../../operations/operations.js';
import { checkName, formatSpec, parseSpec } from '../../vdi/names.js';
import type { Migrated } from './goal-copier.js';
import { Migration, type MigrationResult } from './migration.js';
import type { MigrationOptions, Verify } from './migration-run.js';

export type { Migrated, MigrationResult, Verify };

export interface MigrateOptions extends Omit<MigrationOptions, 'name' | 'newName'> {
  /** The VDI's name in the target; undefined for the same. */
  readonly as: string | undefined;
}

/** `text`: NAME, @=NAME or @ID. Errors: BAD_NAME, NO_VDI, and those of Migration.run. */
export async function migrateVdi(
  source: Operations,
  target: Operations,
  text: string,
  { as, ...options }: MigrateOptions,
): Promise<MigrationResult & { readonly newName: string }> {
  const name = await nameOf(source, text);
  const newName = as ?? name;
  if (as === undefined && formatSpec({ name, tag: undefined }) !== name) {
    throw new OperationError(
      'BAD_NAME',
      `the name of ${text} is not allowed in ${target.store}; give another one with --as`,
    );
  }
  checkName(newName);
  return { ...(await new Migration(source, target, { ...options, name, newName }).run()), newName };
}

/** Errors: BAD_NAME, NO_VDI. */
async function nameOf(source: Operations, text: string): Promise<string> {
  const { name, tag, vid } = parseSpec(text);
  if (tag !== undefined) {
    throw new OperationError('BAD_NAME', `"${text}": a VDI is migrated with all its snapshots; give only its name`);
  }
  return vid === undefined ? name : (await source.show(text)).name;
}
