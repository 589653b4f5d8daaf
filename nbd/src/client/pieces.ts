/** A long range, done in pieces, several at a time. */

/**
 * Do [0, length) with `one`, in pieces of `pieceBytes`, at most `atOnce` at a time. After a failure no further piece is
 * begun; the first failure is thrown when all that were begun have settled, so that no memory is in use any more.
 */
export async function inPieces(
  length: number,
  pieceBytes: number,
  atOnce: number,
  one: (at: number, length: number) => Promise<void>,
): Promise<void> {
  let next = 0;
  const failures: unknown[] = [];
  const lane = async (): Promise<void> => {
    while (next < length && failures.length === 0) {
      const at = next;
      next += pieceBytes;
      try {
        await one(at, Math.min(pieceBytes, length - at));
      } catch (error) {
        failures.push(error);
      }
    }
  };
  await Promise.all(Array.from({ length: Math.min(atOnce, Math.ceil(length / pieceBytes)) }, lane));
  if (failures.length > 0) throw failures[0];
}
