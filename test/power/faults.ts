/**
 * The mistakes that the harness must find, planted one at a time: in the code (src/store/local/planted-faults.ts), or in the disk,
 * which then lies. Owns how each is planted, and takes it away again.
 */
import { plant, type PlantedFault } from '../../src/store/local/planted-faults.js';
import { enumerate, type Failure, type Progress } from './enumerate.js';
import type { MachineOptions } from './machine.js';

type DiskFault = 'no data sync before the map' | 'no directory sync';
export type Fault = PlantedFault | DiskFault;

const LIES: Readonly<Record<DiskFault, NonNullable<MachineOptions['liesAbout']>>> = {
  'no data sync before the map': (sync) => sync === 'data',
  'no directory sync': (sync) => sync === 'names',
};

export const FAULTS: readonly Fault[] = [
  'no data sync before the map',
  'no directory sync',
  'release before commit',
  'log of another boot',
  'flush skips new objects',
  'snapshot before its commit',
  'bitmap before data',
  'merge drops its base early',
];

const MAX_UNRECORDED = 50;

function isOfState({ state }: Failure): boolean {
  return state.split('/').length > 2;
}

/** Looks for a violation in up to `states` states. */
export async function findFault(
  fault: Fault,
  options: { readonly seed: string; readonly place: string; readonly states: number },
): Promise<{ readonly failure: Failure | undefined; readonly progress: Progress }> {
  let failure: Failure | undefined;
  let unrecorded = 0;
  const isOfDisk = fault in LIES;
  plant(isOfDisk ? undefined : (fault as PlantedFault));
  try {
    const progress = await enumerate({
      ...options,
      ...(isOfDisk ? { liesAbout: LIES[fault as DiskFault] } : {}),
      takesBackups: false,
      failed: (found) => {
        // A workload that cannot even be recorded proves nothing about crash states.
        if (!isOfState(found) && ++unrecorded < MAX_UNRECORDED) return true;
        if (isOfState(found)) failure = found;
        return false;
      },
    });
    return { failure, progress };
  } finally {
    plant(undefined);
  }
}
