/**
 * The message when a part of the program cannot be loaded: a native library that was not installed or was built for another system,
 * or a file that is gone because another version was installed meanwhile. These are not internal errors.
 */

/** Messages of koffi 3 and of lmdb 3 (node-gyp-build-optional-packages), which have no code. */
const NO_NATIVE_LIBRARY = /^Cannot find the native Koffi module|^No native build was found for/;

/** The message for a failure to load a part, or undefined for any other error. */
export function missingPart(error: unknown): string | undefined {
  const { code, message } = (error ?? {}) as { code?: unknown; message?: unknown };
  const reason = String(message).split('\n')[0];
  if (code === 'ERR_DLOPEN_FAILED' || NO_NATIVE_LIBRARY.test(reason ?? '')) {
    return (
      `a native library cannot be loaded (${reason}); Sheepgate needs Linux with glibc, and its optional dependencies: ` +
      'install it again with npm, without --omit=optional'
    );
  }
  if (code === 'MODULE_NOT_FOUND' || code === 'ERR_MODULE_NOT_FOUND') {
    return (
      `a part of this program is missing (${reason}); if another version was installed just now, run the command ` +
      'again, otherwise install Sheepgate again'
    );
  }
  return undefined;
}
