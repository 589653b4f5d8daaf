/**
 * Exports of the provider, opened or described for a client, with their geometry completed and checked before anything is
 * announced. An export that fails the check is closed again.
 */

import type { BlockDevice, ExportInfo, Geometry } from '../block-device.js';
import { completeDevice, completeGeometry, isBlockDevice, type AnyDevice } from '../device.js';
import { checkedInfo } from './export-info.js';
import { geometryProblem, missingMethod, type ServedDevice } from './geometry.js';
import type { CheckedExport, HandshakeHost } from './handshake-host.js';

/**
 * Open an export and check that it can be served; a device of the small interface is completed. Errors: those of the
 * provider; Error if the check fails, the device closed.
 */
export async function openChecked(
  host: Pick<HandshakeHost, 'clock' | 'export' | 'peer'>,
  name: string,
): Promise<CheckedExport> {
  const opening = host.export.open(name, host.peer);
  try {
    const { device: opened, info } = await host.clock.during(`opened the export ${JSON.stringify(name)}`, opening);
    const device = wholeDevice(opened);
    const geometry = checkedGeometry(name, device.geometry, device);
    return { device: device as ServedDevice, geometry, info };
  } catch (error) {
    // Nothing, if it was not opened.
    await host.export.close('lost');
    throw error;
  }
}

function wholeDevice(device: AnyDevice): BlockDevice {
  return isBlockDevice(device) ? device : completeDevice(device);
}

/** The checked geometry of an export that is not opened. Errors: those of the provider; Error if the check fails. */
export async function describeExport(
  host: Pick<HandshakeHost, 'clock' | 'export' | 'peer'>,
  name: string,
  contexts?: readonly string[],
): Promise<{ readonly geometry: Geometry; readonly info: ExportInfo }> {
  const asked = host.export.describe(name, host.peer, contexts);
  const described: unknown = await host.clock.during(`described the export ${JSON.stringify(name)}`, asked);
  if (typeof described !== 'object' || described === null) throw new Error('describe returned no geometry and info');
  const { geometry, info } = described as { readonly geometry?: unknown; readonly info?: unknown };
  return { geometry: checkedGeometry(name, geometry), info: checkedInfo(info) };
}

/** The geometry with its defaults. Errors: Error if it cannot be announced, or `device` lacks a method that it announces. */
function checkedGeometry(name: string, given: unknown, device?: BlockDevice): Geometry {
  const problemOf = (): Geometry | string => {
    if (typeof given !== 'object' || given === null) return 'it has no geometry';
    // A small device has its geometry on it, and was given as its own.
    const geometry = 'read' in given ? wholeDevice(given as AnyDevice).geometry : given;
    const whole = completeGeometry(geometry as Geometry);
    return geometryProblem(whole) ?? (device && missingMethod(device, whole)) ?? whole;
  };
  const found = problemOf();
  if (typeof found === 'string') throw new Error(`export ${JSON.stringify(name)} cannot be served: ${found}`);
  return found;
}
