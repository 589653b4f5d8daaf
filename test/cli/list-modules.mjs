// Loaded before sheepgate (node --import): appends the address of every module that is loaded to the file $MODULES.
import { register } from 'node:module';

const hooks = `
  import fs from 'node:fs';
  export async function load(url, context, next) {
    fs.appendFileSync(process.env.MODULES, url + '\\n');
    return next(url, context);
  }`;
register(`data:text/javascript,${encodeURIComponent(hooks)}`);
