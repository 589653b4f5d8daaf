/**
 * Checks of the control socket around a start. Owns the errors for a second daemon on the same store and for a control socket that
 * cannot be made. Makes nothing but the directory of the control socket.
 */
import fs from 'node:fs';
import path from 'node:path';
import { controlSocketOf, makeSocketDirectory } from '../operations/default-paths.js';
import { checkSocketPath } from '../operations/socket-address.js';
import { OperationError } from '../operations/operations.js';
import { refuseUsedSocket, socketState } from '../operations/socket-state.js';
import { trustedSocket } from '../operations/socket-trust.js';
import { directoryOf } from '../store/locations.js';
import { reasonOf } from '../system/system-error.js';

/** Errors: IN_USE. */
export async function refuseSecondDaemon(store: string): Promise<void> {
  const socketPath = controlSocketOf(store);
  if ((await socketState(socketPath)) !== 'alive') return;
  throw new OperationError(
    'IN_USE',
    `a daemon serves the store ${store} already (its control socket is ${socketPath}); stop it first, or give another --store`,
  );
}

/** Finds, before the store is opened, what would keep the socket from being made. Errors: BAD_USAGE, IN_USE, PERMISSION. */
export async function checkControlSocket(controlPath: string, store: string): Promise<void> {
  checkSocketPath(controlPath);
  await refuseUsedSocket(controlPath);
  const directory = path.dirname(controlPath);
  // The store's own directory is made with the store.
  const own = directoryOf(store);
  if (own !== undefined && directory === path.resolve(own)) return;
  makeSocketDirectory(directory);
  try {
    fs.accessSync(directory, fs.constants.W_OK | fs.constants.X_OK);
  } catch (error) {
    throw new OperationError(
      'PERMISSION',
      `cannot make the control socket ${controlPath}: ${reasonOf(error as Error)}; give --control PATH to have it elsewhere`,
      { cause: error },
    );
  }
}

/** Why commands will refuse to use our own control socket (socket-trust.ts); undefined if they will not. */
export function doubtOf(controlPath: string): string | undefined {
  try {
    trustedSocket(controlPath);
    return undefined;
  } catch (error) {
    return (error as Error).message;
  }
}
