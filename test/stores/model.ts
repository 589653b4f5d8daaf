/**
 * The reference for the property test: per VDI and snapshot all its bytes, and per object a version that changes whenever the
 * object was written, or zeroed where it was not zeros. Two of a line may differ in the objects whose versions differ, and in no
 * others. Owns nothing of a store.
 */
export class Model {
  readonly disks = new Map<string, Buffer>();
  readonly versions = new Map<string, number[]>();
  /** Names of the working VDIs; the first one stays. */
  working: string[] = [];
  #version = 0;

  constructor(readonly objectSize: number) {}

  add(name: string, content: Buffer, versions: readonly number[] = []): void {
    this.disks.set(name, content);
    this.versions.set(name, [...versions]);
  }

  /** `name` as `from` is now. */
  copy(name: string, from: string): void {
    this.add(name, Buffer.from(this.contentOf(from)), this.versions.get(from));
  }

  delete(name: string): void {
    this.disks.delete(name);
    this.versions.delete(name);
    this.working = this.working.filter((other) => other !== name);
  }

  contentOf(name: string): Buffer {
    const content = this.disks.get(name);
    if (content === undefined) throw new Error(`the model has no ${name}`);
    return content;
  }

  /** The range was written, or may have been. */
  touch(name: string, at: number, length: number): void {
    const versions = this.versions.get(name) ?? [];
    const end = at + length;
    for (let idx = Math.floor(at / this.objectSize); idx * this.objectSize < end; idx++)
      versions[idx] = ++this.#version;
  }

  write(name: string, at: number, data: Buffer): void {
    data.copy(this.contentOf(name), at);
    this.touch(name, at, data.length);
  }

  /** The range becomes zeros. Whether it was not yet. */
  zero(name: string, at: number, length: number): boolean {
    const content = this.contentOf(name);
    let isChange = false;
    for (let done = 0; done < length;) {
      const from = at + done;
      const part = Math.min(this.objectSize - (from % this.objectSize), length - done);
      if (!isZeros(content.subarray(from, from + part))) {
        isChange = true;
        this.touch(name, from, part);
      }
      done += part;
    }
    content.fill(0, at, at + length);
    return isChange;
  }

  resize(name: string, size: number): void {
    const content = this.contentOf(name);
    if (size < content.length) {
      this.zero(name, size, content.length - size);
      // Objects that are cut off are gone, whatever they held.
      const cut = Math.ceil(size / this.objectSize) * this.objectSize;
      if (cut < content.length) this.touch(name, cut, content.length - cut);
    }
    const resized = Buffer.alloc(size);
    content.copy(resized);
    this.add(name, resized, this.versions.get(name));
  }

  get names(): string[] {
    return [...this.disks.keys()];
  }

  get snapshots(): string[] {
    return this.names.filter((name) => name.includes('@') && !isTemporary(name));
  }

  get temporary(): string[] {
    return this.names.filter(isTemporary);
  }
}

function isTemporary(name: string): boolean {
  return name.includes('@now:');
}

export function isZeros(data: Buffer): boolean {
  return data.length === 0 || (data[0] === 0 && data.subarray(1).equals(data.subarray(0, -1)));
}

/** The working VDI that NAME or NAME@TAG is of. */
export function nameOf(spec: string): string {
  return spec.split('@')[0] ?? spec;
}

export function tagOf(spec: string): string {
  return spec.split('@')[1] ?? '';
}
