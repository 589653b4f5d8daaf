/**
 * Stack traces of the bundled program with the lines of src/, for reports of internal errors. Source maps are read only when there
 * is a trace to print.
 */
import fs from 'node:fs';
import { SourceMap, type SourceMapPayload } from 'node:module';
import path from 'node:path';

/** FILE:LINE:COLUMN, as V8 writes the places of a stack trace: `at name (PLACE)`, `at PLACE`. */
const PLACE = /(?<=\(|\bat (?:async )?)(?:file:\/\/)?(\/[^()\n]*\.js):(\d+):(\d+)/g;

/** The stack trace of an error, or the error as text if it has none. A place without a source map stays as it is. */
export function readableStack(error: unknown): string {
  const stack = (error as Error | undefined)?.stack ?? String(error);
  const maps = new Map<string, SourceMap | undefined>();
  return stack.replace(PLACE, (place, file: string, line: string, column: string) => {
    if (!maps.has(file)) maps.set(file, sourceMapOf(file));
    // Counted from 0 there, and from 1 in a trace.
    const entry = maps.get(file)?.findEntry(Number(line) - 1, Number(column) - 1);
    if (entry === undefined || !('originalSource' in entry)) return place;
    return `${path.resolve(path.dirname(file), entry.originalSource)}:${entry.originalLine + 1}:${entry.originalColumn + 1}`;
  });
}

/** No source map, or a damaged one: the trace is still printed. */
function sourceMapOf(file: string): SourceMap | undefined {
  try {
    return new SourceMap(JSON.parse(fs.readFileSync(`${file}.map`, 'utf8')) as SourceMapPayload);
  } catch {
    return undefined;
  }
}
