/**
 * The export through which a command fills a VDI, while no other client can open it: NAME/unfinished=RUN, where RUN is that of
 * the mark in the VDI's record. Only connections through the control socket may use this form. Owns its parsing and formatting.
 */
import type { Peer } from 'nbd-server-ts';

const FORM = /^([^/]*)\/unfinished=([0-9a-f]{1,32})$/;

export function unfinishedExport(name: string, run: string): string {
  return `${name}/unfinished=${run}`;
}

/** `run` is undefined for every other name. */
export function parseUnfinishedExport(
  exportName: string,
  peer: Peer,
): { readonly name: string; readonly run?: string } {
  const [, name, run] = (peer.transport === 'internal' && FORM.exec(exportName)) || [];
  return name === undefined || run === undefined ? { name: exportName } : { name, run };
}
