/**
 * Finds the VDI or snapshot that a name means. Owns the rules for that (tags that mean several snapshots, temporary
 * snapshots, ids) and the errors for names that mean nothing, something else, something damaged or something unfinished.
 */
import type { DamagedVdi, ObjectStore } from '../store/object-store.js';
import { StoreError } from '../store/store-error.js';
import type { VdiRecord } from '../store/vdi-record.js';
import { CatalogError } from './catalog-error.js';
import { isTemporaryTag, parseSpec, specOf, type VdiSpec } from './names.js';
import type { OpenVdis } from './open-vdis.js';
import { describeUnfinished, isHeldBy, notHeldBy, type Circumstances } from './unfinished.js';

export class Lookup {
  readonly #store: ObjectStore;
  readonly #open: OpenVdis;

  constructor(store: ObjectStore, open: OpenVdis) {
    this.#store = store;
    this.#open = open;
  }

  /** The VDI and snapshots of one name, snapshots in the order they were taken. Its cost does not grow with other names. */
  async named(name: string): Promise<readonly VdiRecord[]> {
    return this.#store.catalog.named(name);
  }

  /** VDIs and snapshots that cannot be listed, because they cannot be read. */
  async damaged(): Promise<readonly DamagedVdi[]> {
    return (await this.#store.catalog.damaged?.()) ?? [];
  }

  /** "NAME", "NAME@TAG" or another form of names.ts. Errors: BAD_NAME, those of `find`. */
  async findText(spec: string): Promise<VdiRecord> {
    return this.find(parseSpec(spec));
  }

  /** Errors: NO_VDI, NO_TAG, AMBIGUOUS (several snapshots have the tag), StoreError DAMAGED (it cannot be read). */
  async find({ name, tag, vid }: VdiSpec): Promise<VdiRecord> {
    if (vid !== undefined) return this.#findById(vid);
    const named = await this.named(name);
    const tagged = named.filter((record) =>
      tag === undefined ? !record.isSnapshot : record.isSnapshot && record.tag === tag,
    );
    // A snapshot to which another tool gave such a tag is not temporary, and must not be dropped as one.
    const saysTemporary = isTemporaryTag(tag ?? '');
    const fitting = saysTemporary ? tagged.filter(({ isTemporary }) => isTemporary) : tagged;
    // Of temporary snapshots with one tag, the newest that is open.
    const newest = fitting.length > 1 && saysTemporary ? fitting.reverse() : fitting;
    const found = newest.find((record) => this.#open.isUsed(record.vid)) ?? newest[0];
    if (found && tag !== undefined && !saysTemporary && (found.isDoubtful || fitting.length > 1)) {
      throw ambiguous(found, named);
    }
    if (found) return found;
    await this.#mustNotBeDamaged(name, named);
    if (named.length === 0) {
      throw new CatalogError(
        'NO_VDI',
        `no VDI named "${name}" in ${this.#store.location}; 'sheepgate vdi list' shows what is there`,
      );
    }
    if (tag === undefined) {
      throw new CatalogError(
        'NO_VDI',
        `"${name}" has only snapshots, and no working VDI; clone a snapshot to write again`,
      );
    }
    const [other] = tagged;
    if (other) {
      throw new CatalogError(
        'NO_TAG',
        `"${name}" has no temporary snapshot "${tag}"; another tool has given this tag to ${specOf(other)}`,
      );
    }
    throw new CatalogError('NO_TAG', `"${name}" has no snapshot "${tag}"; 'sheepgate vdi list' shows what is there`);
  }

  /** Errors: IS_SNAPSHOT, those of `find`. */
  async findWorking(name: string): Promise<VdiRecord> {
    const spec = parseSpec(name);
    const found = spec.tag === undefined ? await this.find(spec) : undefined;
    if (found === undefined || found.isSnapshot)
      throw new CatalogError('IS_SNAPSHOT', `${name} is a snapshot; give the VDI's name alone`);
    return found;
  }

  /**
   * `purpose`, for the message: "clone". Errors: IS_SNAPSHOT (it is none), UNSUPPORTED (it is temporary, and ends with its
   * reader), those of `find`.
   */
  async findSnapshot(text: string, purpose: string): Promise<VdiRecord> {
    const spec = parseSpec(text);
    const found = spec.tag !== undefined || spec.vid !== undefined ? await this.find(spec) : undefined;
    if (!found?.isSnapshot) {
      throw new CatalogError('IS_SNAPSHOT', `can only ${purpose} a snapshot: give NAME@TAG, not "${text}"`);
    }
    if (found.isTemporary) {
      throw new CatalogError(
        'UNSUPPORTED',
        `cannot ${purpose} the temporary snapshot ${text}; take a permanent one with 'sheepgate vdi snapshot'`,
      );
    }
    return found;
  }

  /** Snapshots outlive their VDI and keep its name taken. Errors: EXISTS. */
  async mustNotExist(name: string): Promise<void> {
    const named = await this.named(name);
    const [first] = named;
    if (first) throw await this.exists(named.find(({ isSnapshot }) => !isSnapshot) ?? first, '');
  }

  /** The error EXISTS. `hint` follows the state of an unfinished VDI that no command is working on. */
  async exists(record: VdiRecord, hint: string): Promise<CatalogError> {
    const exists = `a VDI or snapshot named "${record.name}" exists already in ${this.#store.location}`;
    if (!record.unfinished) return new CatalogError('EXISTS', exists);
    const circumstances = await this.#circumstancesOf(record);
    const left = describeUnfinished(record, circumstances);
    return new CatalogError('EXISTS', `${exists}: ${left}${circumstances.isAtWork ? '' : hint}`);
  }

  /** Errors: UNFINISHED (`run` is not the run that fills the VDI, or it is being filled and there is no `run`). */
  async mustBeHeldBy(record: VdiRecord, run: string | undefined): Promise<void> {
    if (!isHeldBy(record, run)) throw notHeldBy(record, run, await this.#circumstancesOf(record));
  }

  async #circumstancesOf({ name, vid }: VdiRecord): Promise<Circumstances> {
    const isOpen = this.#open.isUsed(vid);
    const hasSnapshots = (await this.named(name)).some((other) => other.isSnapshot && !other.isTemporary);
    // Only of a store that no other process serves it is known that no command has the VDI open.
    return { isAtWork: isOpen || (this.#store.state?.isShared ? undefined : false), hasSnapshots };
  }

  /** The name is not among `named`; it may be there and unreadable. Errors: StoreError DAMAGED. */
  async #mustNotBeDamaged(name: string, named: readonly VdiRecord[]): Promise<void> {
    const [damaged] = (await this.#store.catalog.damaged?.(name)) ?? [];
    if (!damaged) return;
    const rest = named.length === 0 ? '' : `; these can be read: ${named.map(specOf).join(', ')}`;
    throw new StoreError(
      'DAMAGED',
      `the VDI or snapshot of "${name}" with the id ${damaged.vid.toString(16)} in ${this.#store.location} cannot be read: ` +
        `${damaged.why}${rest}`,
    );
  }

  /** Not a temporary snapshot: it ends with the connections that have it open, and no others may open or delete it. */
  async #findById(vid: number): Promise<VdiRecord> {
    const found = await this.#store.catalog.record(vid);
    if (found && !found.isTemporary) return found;
    const { location } = this.#store;
    const damaged = (await this.damaged()).find((other) => other.vid === vid);
    if (damaged) throw new StoreError('DAMAGED', `${vid.toString(16)} in ${location}: ${damaged.why}`);
    throw new CatalogError(
      'NO_VDI',
      `nothing has the id ${vid.toString(16)} in ${location}; 'sheepgate vdi list' shows the ids; with every snapshot a ` +
        'VDI gets a new one',
    );
  }
}

/** The error AMBIGUOUS: the snapshots that `record`'s tag may mean, and how to name each. */
function ambiguous({ name, tag }: VdiRecord, named: readonly VdiRecord[]): CatalogError {
  const meant = named.filter(
    (other) =>
      other.isSnapshot && !other.isTemporary && (other.tag === tag || String(other.snapId) === String(Number(tag))),
  );
  const list = meant.map((other) => `@${other.vid.toString(16)} (tag "${other.tag}", number ${other.snapId})`);
  return new CatalogError(
    'AMBIGUOUS',
    `"${name}@${tag}" is ambiguous, because several snapshots have this tag or number; give the ID of one of them: ` +
      list.join(', '),
  );
}
