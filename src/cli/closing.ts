/** Work on something that must be closed whatever happens, and which failure is told then. */
export async function closing<T>(thing: { close(): Promise<void> }, work: () => Promise<T>): Promise<T> {
  let result: T;
  try {
    result = await work();
  } catch (error) {
    // The first failure is the one to tell.
    await thing.close().catch(() => undefined);
    throw error;
  }
  await thing.close();
  return result;
}
