/**
 * Runs before the tests of a client set: builds its root directory if needed, and prints the versions under test. If that
 * fails, every test of this set fails with the reason; the tests of other sets run.
 */
import type { TestProject } from 'vitest/node';
import { buildClientSet, clientSetNamed, releaseOf, versionsOf } from '../harness/client-set.js';

declare module 'vitest' {
  interface ProvidedContext {
    /** Why the set of this project could not be built. */
    clientSetFailure: string | undefined;
  }
}

export default function setUp(project: TestProject): void {
  try {
    buildClientSet(project.name);
  } catch (error) {
    console.log((error as Error).message);
    project.provide('clientSetFailure', (error as Error).message);
    return;
  }
  project.provide('clientSetFailure', undefined);
  const set = clientSetNamed(project.name);
  const versions = Object.entries(versionsOf(set)).map(([program, version]) => `${program} ${version}`);
  console.log(`clients "${set.name}", ${releaseOf(set)}: ${versions.join(', ')}`);
}
