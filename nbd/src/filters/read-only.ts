/** A filter that lets nothing be changed. It owns the refusal; reads, extents and flushes pass. */

import { DeviceError, type CompleteDevice } from '../block-device.js';
import type { AnyDevice } from '../device.js';
import { Forwarding } from './forwarding.js';

/** `device`, read-only: it is announced so, and whatever would change data fails with EPERM. */
export function readOnly(device: AnyDevice): CompleteDevice {
  return new ReadOnly(device);
}

class ReadOnly extends Forwarding {
  constructor(device: AnyDevice) {
    const none = { canFua: false, canTrim: false, canZero: false, canFastZero: false };
    super(device, { ...none, readOnly: true });
  }

  override write(): never {
    throw refusal('write');
  }

  override zero(): never {
    throw refusal('zero');
  }

  override trim(): never {
    throw refusal('trim');
  }
}

function refusal(method: string): DeviceError {
  return new DeviceError('EPERM', `${method}: the device is read-only`);
}
