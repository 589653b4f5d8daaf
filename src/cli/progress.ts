/** The progress of a job: one line on stderr that overwrites itself, on a terminal only. Never on stdout. */
import type { Progress } from '../jobs/reporting.js';
import { printable } from '../text/printable.js';
import { formatSize } from '../text/size.js';

const EVERY_MS = 200;
const NOTHING: Progress = { advance: () => undefined, end: () => undefined };

/** `total` in bytes, or undefined if it is not known. */
export function startProgress(what: string, total: number | undefined, stream = process.stderr): Progress {
  if (!stream.isTTY) return NOTHING;
  const startedAt = performance.now();
  let done = 0;
  const draw = (): void => {
    const seconds = (performance.now() - startedAt) / 1000;
    const rate = done / Math.max(seconds, 0.001);
    const parts = [`${printable(what)}: ${formatSize(done)}`];
    if (total !== undefined && total > 0) {
      parts.push(`of ${formatSize(total)}, ${Math.floor((100 * done) / total)} %`);
    }
    parts.push(`, ${formatSize(Math.round(rate))}/s`);
    if (total !== undefined && rate > 0 && seconds > 2) parts.push(`, ${formatSeconds((total - done) / rate)} left`);
    stream.write(
      `\r\x1b[K${parts
        .join(' ')
        .replaceAll(' ,', ',')
        .slice(0, (stream.columns || 80) - 1)}`,
    );
  };
  const timer = setInterval(draw, EVERY_MS);
  return {
    advance: (bytes) => {
      done += bytes;
    },
    end: () => {
      clearInterval(timer);
      stream.write('\r\x1b[K');
    },
  };
}

function formatSeconds(seconds: number): string {
  const whole = Math.ceil(seconds);
  if (whole < 60) return `${whole} s`;
  const minutes = Math.floor(whole / 60);
  return minutes < 60 ? `${minutes} min ${whole % 60} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}
