/**
 * The order in which a daemon stops, and how long each step may take; also used to clean up after a failed start. The order makes a
 * stop lose nothing: requests in flight end and their disks are flushed before the store is closed. Starts nothing.
 */
import type { NbdServer } from 'nbd-server-ts';
import type { OpenedStore } from '../operations/open-directly.js';
import { OperationError } from '../operations/operations.js';
import { directoryOf } from '../store/locations.js';
import type { ControlServer } from './control/control-server.js';
import type { DeadPeerTimeouts } from './dead-peer-timeouts.js';
import type { StoreAndPeerLines } from './log/repeated-lines.js';

/** How long requests in flight may take to finish when the daemon stops. */
const STOP_GRACE_MS = 10_000;
/**
 * How long, after that, the release of locks and the deletion of temporary snapshots on a cluster's nodes may take. Those that are
 * not answered by then stay as after a crash; the next start finds them.
 */
const CLUSTER_CLOSE_MS = 10_000;

/** The parts of a daemon that are stopped. */
export interface RunningParts {
  readonly nbd: NbdServer;
  readonly deadPeers: DeadPeerTimeouts;
  readonly repeated: StoreAndPeerLines;
  readonly stopLoggingFailures: () => void;
  /** When aborted, a cluster is not waited for any more. */
  readonly leaving: AbortController;
  /** Undefined until the store is open. */
  operations: OpenedStore | undefined;
  /** Undefined until the control socket is listened on. */
  control: ControlServer | undefined;
}

/**
 * Take no more connections and commands, finish the requests in flight, flush, and close the store. Errors: CLOSED (a cluster did
 * not answer in time), and those of closing the store.
 */
export async function stopInOrder(parts: RunningParts): Promise<void> {
  const { nbd, deadPeers, repeated, stopLoggingFailures, leaving, operations, control } = parts;
  // First: commands that wait for the store report from now on that its daemon is stopping.
  operations?.announceStop();
  await Promise.all([nbd.close({ graceMs: STOP_GRACE_MS, refuse: false }), control?.close(STOP_GRACE_MS)]);
  stopLoggingFailures();
  deadPeers.stop();
  try {
    if (operations !== undefined) await closeStore(operations, leaving);
  } finally {
    // Last: closing the store may log, too.
    repeated.ofStore.close();
    repeated.ofPeers.close();
  }
}

/** Errors: CLOSED (a cluster did not answer in time), and those of closing the store. */
async function closeStore(operations: OpenedStore, leaving: AbortController): Promise<void> {
  const isRemote = directoryOf(operations.store) === undefined;
  const late = new AbortController();
  const leave = (): void => {
    late.abort();
    leaving.abort();
  };
  const timer = setTimeout(leave, CLUSTER_CLOSE_MS);
  try {
    await operations.close();
    // Requests were cut off, and may have been done or not.
    if (late.signal.aborted && isRemote) throw new Error('requests to it were cut off');
  } catch (error) {
    if (!leaving.signal.aborted || !isRemote) throw error;
    throw new OperationError(
      'CLOSED',
      `${operations.store} was closed before its nodes answered: locks and temporary snapshots of this daemon may still be ` +
        'there; the next start drops the snapshots',
      { cause: error },
    );
  } finally {
    clearTimeout(timer);
  }
}
