/**
 * Uses of the library that its types must refuse: packed.test.ts compiles it beside program.ts. If declarations were not
 * found, everything would be `any` and nothing an error, and the compiler complains that no error was found here.
 */
import { DeviceError, NbdServer } from 'nbd-server-ts';
import { NbdClient } from 'nbd-server-ts/client';

export function wrongUses(client: NbdClient): unknown[] {
  return [
    // @ts-expect-error: a server must have a provider
    new NbdServer({}),
    // @ts-expect-error: a code of DeviceErrorCode is wanted
    new DeviceError('EWRONG', 'no such code'),
    // @ts-expect-error: an offset is a number
    client.read('0', 1),
  ];
}
