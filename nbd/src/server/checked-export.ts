/**
 * Exports of the provider, opened or described for a client, with their geometry completed and checked before anything is
 * announced. An export that fails the check is closed again.
 */

import type { BlockDevice, DeviceGeometry, ExportInfo, Geometry } from '../block-device.js';
import { completeGeometry } from '../device.js';
import { geometryProblem, missingMethod, type ServedDevice } from './geometry.js';
import type { CheckedExport, HandshakeHost } from './handshake-host.js';

/**
 * Open an export and check that it can be served. Errors: those of the provider; Error if the check fails, the device
 * closed.
 */
export async function openChecked(
  host: Pick<HandshakeHost, 'clock' | 'export' | 'peer'>,
  name: string,
): Promise<CheckedExport> {
  const opening = host.export.open(name, host.peer);
  const { device, info } = await host.clock.during(`opened the export ${JSON.stringify(name)}`, opening);
  try {
    const geometry = checkedGeometry(name, device.geometry, device);
    return { device: device as ServedDevice, geometry, info };
  } catch (error) {
    await host.export.close('lost');
    throw error;
  }
}

/** The checked geometry of an export that is not opened. Errors: those of the provider; Error if the check fails. */
export async function describeExport(
  host: HandshakeHost,
  name: string,
  contexts?: readonly string[],
): Promise<{ readonly geometry: Geometry; readonly info: ExportInfo }> {
  const asked = host.provider.describe(name, host.peer, contexts);
  const { geometry, info } = await host.clock.during(`described the export ${JSON.stringify(name)}`, asked);
  return { geometry: checkedGeometry(name, geometry), info };
}

/** The geometry with its defaults. Errors: Error if it cannot be announced, or `device` lacks a method that it announces. */
function checkedGeometry(name: string, given: DeviceGeometry, device?: BlockDevice): Geometry {
  const geometry = completeGeometry(given);
  const problem = geometryProblem(geometry) ?? (device && missingMethod(device, geometry));
  if (problem !== undefined) throw new Error(`export ${JSON.stringify(name)} cannot be served: ${problem}`);
  return geometry;
}
