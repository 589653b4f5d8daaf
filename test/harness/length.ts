/**
 * How long tests may take that can be made longer: property tests, load. SHEEPGATE_TEST_LENGTH says it (package.json:
 * test:quick, test, test:long).
 */
export type Length = 'quick' | 'full' | 'long';

const LENGTHS: readonly Length[] = ['quick', 'full', 'long'];

export const testLength: Length = LENGTHS.find((each) => each === process.env['SHEEPGATE_TEST_LENGTH']) ?? 'full';

/** The number for the length of this run. */
export function byLength<T>(numbers: Readonly<Record<Length, T>>): T {
  return numbers[testLength];
}
