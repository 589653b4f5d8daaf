/** Starts the command line, on a Node that is new enough (sheepgate.cjs looks). */
// libuv reads the size of its thread pool at the pool's first use. Object files are read and synced there, so four threads
// (libuv's default) are too few. How they are shared out is in src/store/local/thread-shares.ts.
process.env.UV_THREADPOOL_SIZE ??= '24';
// lmdb loads msgpackr, whose native part takes longer to load than a short command takes, and nothing here is msgpack.
process.env.MSGPACKR_NATIVE_ACCELERATION_DISABLED ??= 'true';
try {
  void require('../dist/bundle/sheepgate.js').main();
} catch (error) {
  process.stderr.write(
    error?.code === 'MODULE_NOT_FOUND'
      ? `sheepgate: not built yet (${error.message.split('\n')[0]}); run 'npm run build'\n`
      : `${error?.stack}\n`,
  );
  process.exit(1);
}
