// Clients that go and come back, with and without a storage of their own, and a region that restarts under them.

import assert from "node:assert/strict";

import { changeHashes, converged } from "./client.mjs";
import { onEachDatabase } from "./scene.mjs";
import { until } from "./until.mjs";

onEachDatabase("edits made offline by both sides meet when the link is back", async scene => {
  const near = scene.client();
  const author = near.repo.create({ near: 0, far: 0 });
  await near.saved(author);
  const link = await scene.link();
  const far = scene.client({ link });
  const reader = await far.repo.find(author.url);

  await link.cut();
  await until(() => far.repo.peers.length === 0, "the far client to notice that it is offline");
  for (let edit = 1; edit <= 30; edit++) {
    author.change(doc => (doc.near = edit));
    reader.change(doc => (doc.far = edit));
  }
  await near.saved(author);
  assert.equal(reader.doc().near, 0);
  assert.equal(author.doc().far, 0);

  await link.heal();
  await converged(author, reader);
  assert.deepEqual(author.doc(), { near: 30, far: 30 });
});

onEachDatabase("a document created offline is stored once the client is online", async scene => {
  const link = await scene.link();
  await link.cut();
  const writer = scene.client({ link });
  const author = writer.repo.create({ made: "offline" });
  author.change(doc => (doc.edited = "offline"));

  await link.heal();
  await writer.saved(author);
  const reader = await scene.client().repo.find(author.url);
  await scene.caughtUp(reader, author);
  assert.deepEqual(reader.doc(), { made: "offline", edited: "offline" });
});

onEachDatabase("a client that restarts with its storage sends and gets what it missed", async scene => {
  const folder = await scene.folder();
  const before = scene.client({ folder, peerId: "restarting" });
  const author = before.repo.create({ log: ["before"] });
  await before.saved(author);
  await before.repo.flush();
  await scene.leave(before);

  const other = scene.client();
  const elsewhere = await other.repo.find(author.url);
  elsewhere.change(doc => doc.log.push("meanwhile"));
  await other.saved(elsewhere);

  const link = await scene.link();
  await link.cut();
  const after = scene.client({ folder, link, peerId: "restarting" });
  const found = await after.repo.find(author.url);
  assert.deepEqual(found.doc(), { log: ["before"] });
  found.change(doc => (doc.offline = true));

  await link.heal();
  await converged(found, elsewhere);
  assert.deepEqual(elsewhere.doc(), { log: ["before", "meanwhile"], offline: true });
});

onEachDatabase("a client that restarts without storage gets everything again under the same name", async scene => {
  const before = scene.client({ peerId: "forgetful" });
  const author = before.repo.create({ log: ["before"] });
  await before.saved(author);
  await scene.leave(before);

  const after = scene.client({ peerId: "forgetful" });
  const found = await after.repo.find(author.url);
  assert.deepEqual(found.doc(), { log: ["before"] });
  found.change(doc => doc.log.push("after"));
  await after.saved(found);
  const reader = await scene.client().repo.find(author.url);
  await scene.caughtUp(reader, found);
  assert.deepEqual(reader.doc(), { log: ["before", "after"] });
});

const oneName = { alone: "regions do not know the names of each other's clients" };
onEachDatabase("a second client under a name that is in use replaces the first connection", replaces, oneName);

async function replaces(scene) {
  const first = scene.client({ peerId: "twice" });
  const author = first.repo.create({ count: 1 });
  await first.saved(author);
  // The displaced client would come back at once and displace the other in turn, for ever.
  first.adapter.retryInterval = 0;

  const second = scene.client({ peerId: "twice" });
  const found = await second.repo.find(author.url);
  await until(() => first.repo.peers.length === 0, "the first connection to be closed");
  found.change(doc => (doc.count = 2));
  await second.saved(found);
  assert.equal(author.doc().count, 1);
}

onEachDatabase("a region that restarts loses nothing and its clients carry on", async scene => {
  const writers = [scene.client(), scene.client()];
  const first = writers[0].repo.create({ edits: {} });
  await writers[0].saved(first);
  const second = await writers[1].repo.find(first.url);
  const regionBefore = await writers[0].regionStorageId();

  second.change(doc => (doc.edits.before = true));
  await writers[1].saved(second);
  await converged(first, second);
  await scene.region.stop();
  const cutOff = writers.filter(writer => writer.region === scene.region);
  await until(() => cutOff.every(writer => writer.repo.peers.length === 0), "its clients to notice");
  first.change(doc => (doc.edits.meanwhile = "first"));
  second.change(doc => (doc.edits.meanwhileToo = "second"));

  await scene.region.start();
  await converged(first, second);
  const edits = { before: true, meanwhile: "first", meanwhileToo: "second" };
  await until(() => Object.keys(first.doc().edits).length === 3, "all edits");
  assert.deepEqual(first.doc().edits, edits);
  await writers[0].saved(first);
  assert.equal(await writers[0].regionStorageId(), regionBefore);

  const reader = await scene.client().repo.find(first.url);
  await scene.caughtUp(reader, first);
  assert.deepEqual(reader.doc().edits, edits);
  assert.deepEqual(changeHashes(reader), changeHashes(first));
});

onEachDatabase("a document is there after a restart although no client has it any more", async scene => {
  const writer = scene.client();
  const author = writer.repo.create({ text: "" });
  for (let edit = 0; edit < 50; edit++) author.change(doc => (doc.text += "x"));
  await writer.saved(author);
  const hashes = changeHashes(author);
  await scene.leave(writer);
  await scene.region.stop();
  await scene.region.start();
  await scene.mesh.linked();

  for (const region of scene.regions) {
    const reader = await scene.client({ region }).repo.find(author.url);
    if (region !== scene.region) await converged(reader, author);
    assert.equal(reader.doc().text, "x".repeat(50));
    assert.deepEqual(changeHashes(reader), hashes);
  }
});
