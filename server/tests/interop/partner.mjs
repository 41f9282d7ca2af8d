// The JavaScript side of a test that is led by another client: `node partner.mjs SERVER DOCUMENT`. Adds an item to
// the document's list, waits for the other side's third, and prints the list.

import { Client } from "./client.mjs";
import { until } from "./until.mjs";

const [server, url] = process.argv.slice(2);
const client = new Client(server);
const handle = await client.repo.find(url);
handle.change(doc => doc.items.push("javascript"));
await until(() => handle.doc().items.length === 3, "the other side's answer");
await client.saved(handle);
console.log(JSON.stringify(handle.doc().items));
await client.close();
process.exit(0);
