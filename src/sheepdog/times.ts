/** Times as structures hold them: seconds and nanoseconds. */

/** Milliseconds since 1970. */
export function milliseconds(seconds: number, nanoseconds: number): number {
  return seconds * 1000 + Math.floor(nanoseconds / 1_000_000);
}
