/** The rules for stores that can only be read: all content is read as it is, and every change is refused with READ_ONLY. */
import { expect, test } from 'vitest';
import { codeOf, type Session } from './session.js';

export function readOnly(session: Session): void {
  const { objectSize: OBJECT } = session;
  const content = (): ReadonlyMap<string, Buffer> => {
    const { content: known } = session.store;
    if (known === undefined) throw new Error('a store that can only be read needs `content`');
    return known;
  };

  test('all that is in it is listed, shown and read, and its holes are zeros', async () => {
    expect((await session.names()).sort()).toEqual([...content().keys()].sort());
    expect(session.catalog.isReadOnly).toBe(true);
    for (const [spec, expected] of content()) {
      await session.checkSpec(spec, expected);
      expect((await session.catalog.show(spec)).size).toBe(expected.length);
    }
  });

  test('every change of the catalog is refused with READ_ONLY', async () => {
    const { catalog } = session;
    const [name = ''] = [...content().keys()].filter((spec) => !spec.includes('@'));
    const changes: Record<string, () => unknown> = {
      create: () => session.create('new', OBJECT),
      snapshot: () => catalog.snapshot(name, 's'),
      clone: () => catalog.clone(`${name}@first`, 'new'),
      rollback: () => catalog.rollback(`${name}@first`),
      resize: () => catalog.resize(name, 100 * OBJECT),
      remove: () => catalog.remove(name),
      repair: () => catalog.check({ repair: true }),
    };
    for (const [what, change] of Object.entries(changes)) expect(await codeOf(change), what).toBe('READ_ONLY');
    for (const [spec, expected] of content()) await session.checkSpec(spec, expected);
  });

  test('names that do not exist or are invalid are refused as in every store', async () => {
    expect(await codeOf(() => session.catalog.find('nobody'))).toBe('NO_VDI');
    expect(await codeOf(() => session.openVdi('a/b'))).toBe('BAD_NAME');
  });
}
