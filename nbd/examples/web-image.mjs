// A disk image on a web server as a writable disk: changes are kept in memory, and lost at the end.
// node web-image.mjs https://example.org/disk.img 'nbd+unix:///image?socket=image.sock' [NUMBER OF A PARTITION]
import { serve } from 'nbd-server-ts';
import { cache } from 'nbd-server-ts/cache';
import { httpRangeDevice } from 'nbd-server-ts/http-range';
import { overlay } from 'nbd-server-ts/overlay';
import { findPartition, partition } from 'nbd-server-ts/partition';

const [url, uri = 'nbd+unix:///image?socket=image.sock', number] = process.argv.slice(2);
const image = cache(await httpRangeDevice(url));
const disk = number === undefined ? image : partition(image, await findPartition(image, Number(number)));
const server = await serve(uri, overlay(disk));
for (const signal of ['SIGINT', 'SIGTERM']) process.once(signal, () => server.close());
console.log(server.uri);
