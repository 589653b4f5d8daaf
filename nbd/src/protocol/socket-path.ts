/**
 * The longest path of a unix socket. Node silently truncates a longer one (libuv, uv_pipe_bind and uv_pipe_connect), and
 * listens or connects under the shortened name.
 */

/** sockaddr_un.sun_path including its NUL has 108 bytes on Linux, and 104 on macOS and the BSDs. */
const MAX_SOCKET_PATH_BYTES = process.platform === 'linux' ? 107 : 103;

/** Why `path` cannot be the path of a unix socket; undefined if it can. */
export function socketPathProblem(path: string): string | undefined {
  const bytes = Buffer.byteLength(path);
  if (bytes <= MAX_SOCKET_PATH_BYTES) return undefined;
  return `the path has ${bytes} bytes, and that of a unix socket at most ${MAX_SOCKET_PATH_BYTES}`;
}
