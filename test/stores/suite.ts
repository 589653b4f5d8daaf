/**
 * The store suite: the same tests for every store. A file with `storeSuite(kind)` is all that a new store needs, beside its
 * description (store-under-test.ts). Owns which parts a kind gets, the start and the end of the store, and that every test ends
 * with an empty store in which nothing takes up space.
 */
import { afterAll, afterEach, beforeAll, describe } from 'vitest';
import { badInput } from './bad-input.js';
import { concurrency } from './concurrency.js';
import { contract } from './contract.js';
import { objects } from './objects.js';
import { property } from './property.js';
import { readOnly } from './read-only.js';
import { Session } from './session.js';
import type { StoreKind, StoreUnderTest } from './store-under-test.js';

/** Of a loaded machine, with real nodes. */
const START_TIMEOUT_MS = 120_000;

export function storeSuite(kind: StoreKind): void {
  const { label, missing, abilities } = kind;
  if (missing !== undefined) console.log(`skipped: ${label}: ${missing}`);
  describe.skipIf(missing !== undefined)(label, () => {
    let store: StoreUnderTest | undefined;
    const started = (): StoreUnderTest => {
      if (store === undefined) throw new Error(`${label} has not started`);
      return store;
    };
    const session = new Session(abilities, started, kind.effort);

    beforeAll(async () => {
      store = await kind.start();
      await session.start();
    }, START_TIMEOUT_MS);

    afterAll(async () => {
      await session.catalog.close().catch(() => undefined);
      await store?.stop();
    });

    if (!abilities.canWrite) {
      readOnly(session);
      return;
    }
    afterEach(async () => {
      await session.removeAll();
      await session.checkNothingLeft();
    });
    describe('contract', () => contract(session));
    describe('objects', () => objects(session));
    describe('bad input', () => badInput(session));
    describe('concurrency', () => concurrency(session));
    describe('model', () => property(session, kind.sequences));
  });
}
