/**
 * Operations done by a daemon: the catalog over its control API, data over NBD connections through the same socket, so that the
 * daemon's listeners do not matter. Owns those connections. Keeps no state of VDIs.
 */
import { ALLOCATION_CONTEXT, type ExtentSink } from 'nbd-server-ts/block-device';
import { unfinishedExport } from '../export/unfinished-export.js';
import { formatRedundancy } from '../store/redundancy.js';
import { pathOf, type ControlClient } from './control-client.js';
import type { StatusAnswer } from './control-protocol.js';
import { dataPageOf } from './data-page.js';
import {
  OperationError,
  type DamagedVdi,
  type Beginning,
  type CheckReport,
  type MergeState,
  type ConnectionStatus,
  type CreateOptions,
  type DataPage,
  type Disconnected,
  type Disk,
  type Ended,
  type ExportDescription,
  type Filling,
  type ForceOption,
  type LockReport,
  type LockStatus,
  type Operations,
  type ShownVdi,
  type UnlockOptions,
  type VdiDetails,
  type VdiRecord,
} from './operations.js';

export class RemoteOperations implements Operations {
  readonly store: string;
  readonly identity: string;
  readonly isDaemon = true;
  readonly #control: ControlClient;

  constructor({ store, identity }: Pick<StatusAnswer, 'store' | 'identity'>, control: ControlClient) {
    this.store = store;
    this.identity = identity ?? store;
    this.#control = control;
  }

  list(): Promise<readonly VdiRecord[]> {
    return this.#control.call('GET', '/vdis');
  }

  listDetails(): Promise<readonly VdiDetails[]> {
    return this.#control.call('GET', '/vdis?details=1');
  }

  async listDamaged(): Promise<readonly DamagedVdi[]> {
    try {
      return await this.#control.call('GET', '/damaged');
    } catch (error) {
      // A daemon of an earlier version: there a damaged VDI makes every list fail.
      if (error instanceof OperationError && error.code === 'NO_ROUTE') return [];
      throw error;
    }
  }

  show(spec: string): Promise<ShownVdi> {
    return this.#control.call('GET', pathOf('vdis', spec));
  }

  create(name: string, size: number, { blockSizeShift, redundancy, force }: CreateOptions): Promise<VdiRecord> {
    const copies = redundancy && formatRedundancy(redundancy);
    return this.#control.call('POST', '/vdis', { body: { name, size, blockSizeShift, copies, force } });
  }

  begin(name: string, { redundancy, ...beginning }: Beginning): Promise<VdiRecord> {
    const copies = redundancy && formatRedundancy(redundancy);
    return this.#control.call('POST', pathOf('vdis', name, 'begin'), { body: { ...beginning, copies } });
  }

  finish(name: string, run: string): Promise<VdiRecord> {
    return this.#control.call('POST', pathOf('vdis', name, 'finish'), { body: { run } });
  }

  snapshot(
    name: string,
    tag: string,
    options: { readonly takenAt?: number } & Filling & ForceOption = {},
  ): Promise<VdiRecord> {
    return this.#control.call('POST', pathOf('vdis', name, 'snapshots'), { body: { tag, ...options } });
  }

  clone(spec: string, newName: string, { force }: ForceOption = {}): Promise<VdiRecord> {
    return this.#control.call('POST', pathOf('vdis', spec, 'clone'), { body: { name: newName, force } });
  }

  rollback(spec: string, { run, force }: Filling & ForceOption = {}): Promise<VdiRecord & Ended> {
    return this.#control.call('POST', pathOf('vdis', spec, 'rollback'), { body: { run, force } });
  }

  resize(
    name: string,
    size: number,
    { force, forceInUse, run }: Filling & ForceOption & { readonly forceInUse?: boolean },
  ): Promise<VdiRecord> {
    return this.#control.call('POST', pathOf('vdis', name, 'resize'), { body: { size, force, forceInUse, run } });
  }

  async remove(spec: string, { run, force }: Filling & ForceOption = {}): Promise<Ended> {
    const query = new URLSearchParams();
    if (force) query.set('force', '1');
    if (run !== undefined) query.set('run', run);
    const path = pathOf('vdis', spec) + (query.size > 0 ? `?${query.toString()}` : '');
    // null: no temporary snapshots have ended with it.
    return (await this.#control.call<Ended | null>('DELETE', path)) ?? { ended: [] };
  }

  check({ repair }: { readonly repair: boolean }): Promise<CheckReport & Ended> {
    return this.#control.call('POST', '/check', { body: { repair } });
  }

  merging({ paused }: { readonly paused?: boolean } = {}): Promise<MergeState> {
    if (paused === undefined) return this.#control.call('GET', '/merging');
    return this.#control.call('POST', '/merging', { body: { paused } });
  }

  locks(): Promise<LockReport> {
    return this.#control.call('GET', '/locks');
  }

  unlock(spec: string, { heldBy }: UnlockOptions = {}): Promise<LockStatus> {
    return this.#control.call('POST', pathOf('vdis', spec, 'unlock'), { body: { heldBy } });
  }

  changes(spec: string, since: string, offset: number): Promise<DataPage> {
    const query = new URLSearchParams({ since, offset: String(offset) });
    return this.#control.call('GET', `${pathOf('vdis', spec, 'changes')}?${query.toString()}`);
  }

  async clients(): Promise<readonly ConnectionStatus[]> {
    return (await this.#control.status()).connections;
  }

  disconnect(id: number, { keepOutMs }: { readonly keepOutMs: number }): Promise<Disconnected> {
    return this.#control.call('POST', pathOf('connections', String(id), 'disconnect'), { body: { keepOutMs } });
  }

  async openDisk(name: string, { run }: Filling = {}): Promise<Disk> {
    const exportName = run === undefined ? name : unfinishedExport(name, run);
    // The control API gives the catalog's reason for a refusal; NBD has only an error number.
    const { isReadOnly } = await this.#control.call<ExportDescription>('GET', pathOf('exports', exportName));
    // Loaded late: most commands read and write no data.
    const { MAX_PAYLOAD, NbdClient } = await import('nbd-server-ts/client');
    const { socket, head, session } = await this.#control.upgrade();
    try {
      const client = await NbdClient.connect({ socket, head });
      const { size } = await client.go(exportName);
      const extents = async (from: number, length: number, sink: ExtentSink): Promise<void> => {
        for (const extent of await client.blockStatus(ALLOCATION_CONTEXT, from, length)) {
          if (!sink(extent.offset, extent.length, extent.flags)) return;
        }
      };
      return {
        size,
        isReadOnly,
        maxRequestBytes: MAX_PAYLOAD,
        read: (offset, into) => client.readInto(offset, into),
        write: (offset, data) => client.write(offset, data),
        zero: (offset, length) => client.zero(offset, length),
        flush: () => client.flush(),
        dataPage: (offset) => dataPageOf(size, offset, extents),
        close: async () => {
          await client.disconnect();
          await this.#control.call('GET', pathOf('sessions', session));
        },
      };
    } catch (error) {
      socket.destroy();
      throw new OperationError(codeOf(error), `cannot open the export ${exportName}: ${(error as Error).message}`, {
        cause: error,
      });
    }
  }

  close(): Promise<void> {
    return Promise.resolve();
  }
}

function codeOf(error: unknown): string {
  return error instanceof OperationError ? error.code : 'FAILED';
}
