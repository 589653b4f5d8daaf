/** Closing something after work on it, whether the work has succeeded or not. Decides which failure is reported. */

interface Closable {
  close(): Promise<void>;
  /** The work has failed: remove what was created for it. */
  takeBackCreation?(): void;
}

/** Do `work`, then close `thing`. Errors: those of the work; if that succeeded, those of closing. */
export async function closeAfter<T>(thing: Closable, work: () => Promise<T>): Promise<T> {
  let result: T;
  try {
    result = await work();
  } catch (error) {
    thing.takeBackCreation?.();
    // The first failure is the cause; a failure of closing may follow from it.
    await thing.close().catch(() => undefined);
    throw error;
  }
  await thing.close();
  return result;
}
