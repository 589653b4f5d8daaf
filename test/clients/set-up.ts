/** Before the tests of a client set: builds its root directory if need be, and prints which versions are tried. */
import type { TestProject } from 'vitest/node';
import { buildClientSet, clientSetNamed, releaseOf, versionsOf } from '../harness/client-set.js';

export default function setUp(project: TestProject): void {
  buildClientSet(project.name);
  const set = clientSetNamed(project.name);
  const versions = Object.entries(versionsOf(set)).map(([program, version]) => `${program} ${version}`);
  console.log(`clients "${set.name}", ${releaseOf(set)}: ${versions.join(', ')}`);
}
