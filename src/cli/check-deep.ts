/**
 * `sheepgate check --deep`: compares the copies on the nodes of a cluster. Owns the choice of the cluster and the form of the
 * report. Reads from the nodes directly, even if a daemon serves the cluster: it changes nothing, and spares the daemon the work.
 */
import type { Progress } from '../jobs/reporting.js';
import type { DeepReport } from '../operations/inspect-cluster.js';
import { OperationError } from '../operations/operations.js';
import { CLUSTER } from '../store/locations.js';
import { io } from './command-io.js';
import type { CheckOptions } from './check.js';
import { chosenStore } from './common-options.js';
import { interruptible } from './interrupt.js';
import { printJson, printLine, printNote } from './output.js';
import { startProgress } from './progress.js';
import { formatSize } from '../text/size.js';

export async function checkDeep(options: CheckOptions): Promise<void> {
  const location = await clusterOf(options);
  const startedAt = performance.now();
  const report = await interruptible((signal) => readAll(location, options, signal));
  const seconds = (performance.now() - startedAt) / 1000;
  const { problems, stoppedBy, findings, thin } = report;
  if (problems.length > 0) io().exitCode = 1;
  if (options.json) {
    const { vdis, objects, bytesRead } = report;
    const counts = { vdis, objects, bytesRead, seconds, isComplete: stoppedBy === undefined };
    printJson({ ...counts, problems, findings, thin, problemsLeft: problems.length });
  } else {
    for (const problem of problems) printLine(problem);
    printLine(summary(report));
  }
  if (stoppedBy) throw stoppedBy;
}

async function readAll(location: string, options: CheckOptions, signal: AbortSignal): Promise<DeepReport> {
  const { deepCheckCluster } = await import('../operations/inspect-cluster.js');
  let progress: Progress | undefined;
  try {
    return await deepCheckCluster(location, {
      rate: options.rate,
      settleMs: options.settle === undefined ? undefined : options.settle * 1000,
      signal,
      note: printNote,
      progress: {
        begin: (total) => (progress = startProgress('comparing copies', total)),
        advance: (bytes) => progress?.advance(bytes),
      },
    });
  } finally {
    progress?.end();
  }
}

function summary({ vdis, objects, bytesRead, problems, stoppedBy }: DeepReport): string {
  const read = `${vdis} VDIs and snapshots, ${objects} objects, ${formatSize(bytesRead)} read from their nodes`;
  return `${read}, ${problems.length} problems${stoppedBy ? '; not everything was read' : ''}`;
}

/** Errors: BAD_USAGE (a local store). */
async function clusterOf(options: CheckOptions): Promise<string> {
  const { store, control, isStoreGiven } = chosenStore(options);
  if (CLUSTER.isLocation(store)) return store;
  if (control !== undefined && !isStoreGiven) {
    const { controlOfDaemon } = await import('../operations/open-operations.js');
    const daemon = await controlOfDaemon({ store, isStoreGiven, control });
    const served = (await daemon.status()).store;
    if (CLUSTER.isLocation(served)) return served;
  }
  throw new OperationError(
    'BAD_USAGE',
    '--deep compares the copies on the nodes of a cluster, and a local store has no copies; check without --deep compares ' +
      "its objects with its maps, and 'sheepgate export NAME /dev/null' shows whether all data can be read",
  );
}
