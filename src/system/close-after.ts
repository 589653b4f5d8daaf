/** Closing what a command has opened, whether its work has succeeded or not: which failure is told, and what stays. */

interface Closable {
  close(): Promise<void>;
  /** The work has failed, and what was made for it is not wanted. */
  takeBackCreation?(): void;
}

/** Work on something that must be closed whatever happens, and which failure is told then. */
export async function closeAfter<T>(thing: Closable, work: () => Promise<T>): Promise<T> {
  let result: T;
  try {
    result = await work();
  } catch (error) {
    thing.takeBackCreation?.();
    // The first failure is the one to tell.
    await thing.close().catch(() => undefined);
    throw error;
  }
  await thing.close();
  return result;
}
