// Loaded before sheepgate (node --import): writes the paths of all modules that it loads to the file $MODULES.
import fs from 'node:fs';
import { createRequire } from 'node:module';

const { cache } = createRequire(import.meta.url);
process.on('exit', () => fs.writeFileSync(process.env.MODULES, Object.keys(cache).join('\n')));
