// "Saved in the region", as stock clients learn it: remote-heads-changed messages for the region's storage id.

import assert from "node:assert/strict";

import { onEachDatabase } from "./scene.mjs";
import { until } from "./until.mjs";

onEachDatabase("the region announces a stable storage id and that it keeps documents", async scene => {
  const client = scene.client({ region: scene.region });
  const before = await client.regionStorageId();
  assert.match(before, /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/);
  assert.equal(client.repo.peerMetadataByPeerId[client.repo.peers[0]].isEphemeral, false);

  const other = scene.client({ region: scene.region });
  assert.equal(await other.regionStorageId(), before);
  for (const region of scene.regions.slice(1))
    assert.notEqual(await scene.client({ region }).regionStorageId(), before, "each region is a storage of its own");
});

onEachDatabase("a subscriber learns which heads are saved in the region, of its open documents only", async scene => {
  const writer = scene.client();
  const author = writer.repo.create({ edits: 0 });
  const closed = writer.repo.create({ edits: 0 });
  await writer.saved(author);
  await writer.saved(closed);

  const watcher = scene.client({ gossip: true });
  const storageId = await watcher.regionStorageId();
  watcher.repo.subscribeToRemotes([storageId]);
  const watched = await watcher.repo.find(author.url);
  const deaf = scene.client({ gossip: true });
  await deaf.repo.find(author.url);

  closed.change(doc => (doc.edits = 1));
  await writer.saved(closed);
  author.change(doc => (doc.edits = 1));
  await writer.saved(author);
  await until(() => told(watcher, storageId).some(report => equal(report.heads, author.heads())), "the writer's heads");

  watched.change(doc => (doc.edits = 2));
  await until(() => told(watcher, storageId).some(report => equal(report.heads, watched.heads())), "its own heads");

  const reports = told(watcher, storageId);
  for (const report of reports) assert.equal(report.documentId, author.documentId);
  for (const [index, report] of reports.entries()) {
    assert.equal(typeof report.timestamp, "number");
    if (index > 0) assert.ok(report.timestamp >= reports[index - 1].timestamp, "timestamps never go back");
  }
  assert.deepEqual(told(deaf, storageId), [], "who has not subscribed is told nothing");
  assert.deepEqual(watched.getSyncInfo(storageId).lastHeads, watched.heads());
});

/** The reports about one storage that a client received, in order. */
function told(client, storageId) {
  return client.received
    .filter(message => message.type === "remote-heads-changed" && storageId in message.newHeads)
    .map(message => ({ documentId: message.documentId, ...message.newHeads[storageId] }));
}

function equal(left, right) {
  return left.length === right.length && left.every(head => right.includes(head));
}
