/** SIGHUP, which asks a daemon to read its TLS keys and access rules again. */

export interface Hangups {
  /** What SIGHUP does from now on; done immediately if one has come before. */
  serve(reload: () => void): void;
}

/** SIGHUP from the first moment on, so that one that comes while we start is served late instead of ending the process. */
export function catchHangups(): Hangups {
  let isWaiting = false;
  let reload: (() => void) | undefined;
  process.on('SIGHUP', () => {
    if (reload === undefined) isWaiting = true;
    else reload();
  });
  return {
    serve(action) {
      reload = action;
      if (isWaiting) action();
      isWaiting = false;
    },
  };
}
