/**
 * A client of QMP, the control protocol of qemu (docs/interop/qmp-spec: one JSON object a line), over a unix socket. Sends
 * commands one after another and keeps the events that came, for tests that wait for them.
 */
import net from 'node:net';
import { waitUntil } from '../harness/daemon.js';

export interface QmpEvent {
  readonly event: string;
  readonly data: Readonly<Record<string, unknown>>;
}

interface Reply {
  readonly return?: unknown;
  readonly error?: { readonly class: string; readonly desc: string };
}

export class Qmp {
  readonly #socket: net.Socket;
  readonly #replies: Reply[] = [];
  readonly events: QmpEvent[] = [];
  #isClosed = false;

  private constructor(socket: net.Socket) {
    this.#socket = socket;
    let text = '';
    socket.setEncoding('utf8').on('data', (more: string) => {
      text += more;
      for (let end = text.indexOf('\n'); end >= 0; end = text.indexOf('\n')) {
        this.#take(JSON.parse(text.slice(0, end)) as Reply & Partial<QmpEvent>);
        text = text.slice(end + 1);
      }
    });
    socket.on('error', () => undefined).on('close', () => (this.#isClosed = true));
  }

  /** Connect to the socket of a qemu that is starting. */
  static async connect(path: string): Promise<Qmp> {
    const socket = await waitUntil(
      () =>
        new Promise<net.Socket | undefined>((resolve) => {
          const attempt = net.connect({ path });
          attempt.once('connect', () => resolve(attempt)).once('error', () => resolve(undefined));
        }),
      `qemu listens on ${path}`,
    );
    const qmp = new Qmp(socket);
    await qmp.execute('qmp_capabilities');
    return qmp;
  }

  /** Runs one command. Errors: `Error` with qemu's message (if qemu refuses the command). */
  async execute(command: string, args: object = {}): Promise<unknown> {
    this.#socket.write(`${JSON.stringify({ execute: command, arguments: args })}\n`);
    const reply = await waitUntil(() => this.#replies.shift() ?? this.#ended(), `qemu answers ${command}`, 60_000);
    if (reply.error) throw new Error(`${command}: ${reply.error.desc}`);
    return reply.return;
  }

  /** Waits for an event of that name about the job or device `id`, removes it, and returns its data. */
  async event(name: string, id: string): Promise<QmpEvent['data']> {
    const found = await waitUntil(
      () => {
        const at = this.events.findIndex(({ event, data }) => event === name && (data.device ?? data.id) === id);
        return at >= 0 ? this.events.splice(at, 1)[0] : void this.#ended();
      },
      `${name} of ${id}; came: ${JSON.stringify(this.events)}`,
      90_000,
    );
    return found.data;
  }

  close(): void {
    this.#socket.destroy();
  }

  #take(message: Reply & Partial<QmpEvent>): void {
    if (message.event !== undefined) this.events.push({ event: message.event, data: message.data ?? {} });
    else if ('return' in message || message.error) this.#replies.push(message);
  }

  #ended(): undefined {
    if (this.#isClosed) throw new Error('qemu has closed its QMP socket');
  }
}
