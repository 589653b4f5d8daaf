/**
 * Wait for all operations, also if one fails, and then throw the first failure: nothing of a request may still be running when
 * it is answered.
 */
export async function allDone(operations: readonly Promise<void>[]): Promise<void> {
  const results = await Promise.allSettled(operations);
  for (const result of results) if (result.status === 'rejected') throw result.reason;
}
