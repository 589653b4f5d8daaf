/**
 * The changing half of an ObjectVdi that is never changed: a temporary snapshot, or a VDI of a store that can only be read.
 * src/vdi changes neither (src/vdi/store-calls.ts), so each of these calls is a fault of the program.
 */
import type { VdiRecord } from './vdi-record.js';
import type { Switch } from './open-vdi.js';

export abstract class ReadOnlyObjects {
  readonly kind = 'objects';
  abstract readonly record: VdiRecord;

  get creationVid(): number {
    return this.record.vid;
  }

  exclusive(_idx: number): boolean {
    return false;
  }

  canZeroFast(): boolean {
    return false;
  }

  writeObject(): never {
    return this.#refuse();
  }

  createObject(): never {
    return this.#refuse();
  }

  zeroObject(): never {
    return this.#refuse();
  }

  setOwner(): never {
    return this.#refuse();
  }

  mark(): never {
    return this.#refuse();
  }

  resize(): never {
    return this.#refuse();
  }

  prepareSwitch(): Switch {
    return this.#refuse();
  }

  prepareTemporary(): Switch {
    return this.#refuse();
  }

  /** Nothing is dirty. */
  flush(): Promise<void> {
    return Promise.resolve();
  }

  flushObject(): Promise<void> {
    return Promise.resolve();
  }

  #refuse(): never {
    const { name, tag } = this.record;
    throw new Error(`invariant: a change of ${name}@${tag}, which is read-only`);
  }
}
