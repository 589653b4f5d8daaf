/**
 * The order in which a daemon stops, and how long each step may take; the same for a start that has failed half-way. Owns that a
 * stop loses nothing: requests in flight end and their disks are flushed before the store is let go. Starts nothing.
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
 * How long a cluster's nodes may take, after that, to be told what the end of its users means (locks, temporary snapshots).
 * What they do not answer by then is left as after a crash: the next start finds it.
 */
const CLUSTER_CLOSE_MS = 10_000;

/** What there is to stop. */
export interface RunningParts {
  readonly nbd: NbdServer;
  readonly deadPeers: DeadPeerTimeouts;
  readonly repeated: StoreAndPeerLines;
  readonly stopLoggingFailures: () => void;
  /** Aborted when a cluster is not waited for any more. */
  readonly leaving: AbortController;
  /** Undefined until the store is open. */
  operations: OpenedStore | undefined;
  /** Undefined until the control socket is listened on. */
  control: ControlServer | undefined;
}

/**
 * Take no more connections and commands, finish those under way, flush, and let go of the store. Errors: CLOSED if a cluster did
 * not answer in time, and those of closing the store.
 */
export async function stopInOrder(parts: RunningParts): Promise<void> {
  const { nbd, deadPeers, repeated, stopLoggingFailures, leaving, operations, control } = parts;
  // First: who waits for the store from now on is told that its daemon is stopping.
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

/** Errors: CLOSED if a cluster has not answered in its time, and those of closing. */
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
    // What it waited for was cut off, and may be done or not.
    if (late.signal.aborted && isRemote) throw new Error('what was asked of it was cut off');
  } catch (error) {
    if (!leaving.signal.aborted || !isRemote) throw error;
    throw new OperationError(
      'CLOSED',
      `${operations.store} was left without a word: its nodes did not answer in time. Locks and temporary snapshots of this ` +
        'daemon may still be there; the next start drops the snapshots',
      { cause: error },
    );
  } finally {
    clearTimeout(timer);
  }
}
