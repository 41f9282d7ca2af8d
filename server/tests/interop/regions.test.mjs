// What only several regions can get wrong: documents that cross, links that break, a region that dies, goes back in
// time or is reached by way of a third.

import assert from "node:assert/strict";

import { generateAutomergeUrl } from "@automerge/automerge-repo";

import { changeHashes, converged } from "./client.mjs";
import { acrossRegions } from "./scene.mjs";
import { until } from "./until.mjs";

// A client that is left without an answer gives up after a minute.
const QUICKLY_MS = 5_000;

acrossRegions(2, "an edit in one region is read in the other, and answered", async scene => {
  const [here, there] = oneClientEach(scene);
  const author = here.repo.create({ asked: 0, answered: 0 });
  await here.saved(author);
  const reader = await there.repo.find(author.url);

  for (let round = 1; round <= 20; round++) {
    author.change(doc => (doc.asked = round));
    await until(() => reader.doc().asked === round, `question ${round} to arrive`);
    reader.change(doc => (doc.answered = round));
    await until(() => author.doc().answered === round, `answer ${round} to arrive`);
  }
  await converged(author, reader);
});

acrossRegions(2, "a document that was made a moment ago is found at once in the other region", async scene => {
  const [here, there] = oneClientEach(scene);
  for (let number = 0; number < 30; number++) {
    const [writer, reader] = number % 2 === 0 ? [here, there] : [there, here];
    const author = writer.repo.create({ number });
    await writer.saved(author);
    const asked = performance.now();
    const found = await reader.repo.find(author.url);
    assert.ok(performance.now() - asked < QUICKLY_MS, `took ${performance.now() - asked} ms`);
    assert.deepEqual(found.doc(), { number });
  }
  assert.deepEqual(unavailable(here), []);
  assert.deepEqual(unavailable(there), []);
});

acrossRegions(2, "a document that is nowhere is unavailable soon, whatever the regions' link does", async scene => {
  const [, there] = oneClientEach(scene);
  const miss = async () => {
    const asked = performance.now();
    await assert.rejects(there.repo.find(generateAutomergeUrl()), /unavailable/);
    assert.ok(performance.now() - asked < QUICKLY_MS, `took ${performance.now() - asked} ms`);
  };
  await miss();
  scene.mesh.between().hang();
  await miss();
  await scene.mesh.between().cut();
  await miss();
});

acrossRegions(2, "both sides of a partition are written to, and converge after it", async scene => {
  const [here, there] = oneClientEach(scene);
  const author = here.repo.create({ edits: {} });
  await here.saved(author);
  const reader = await there.repo.find(author.url);
  const cables = scene.mesh.between(...scene.regions);
  const edit = async (handle, client, name) => {
    for (let count = 0; count < 20; count++) handle.change(doc => (doc.edits[`${name} ${count}`] = true));
    await client.saved(handle);
  };

  cables.hang();
  await Promise.all([edit(author, here, "here, hanging"), edit(reader, there, "there, hanging")]);
  const made = here.repo.create({ made: "in the partition" });
  await here.saved(made);
  assert.equal(Object.keys(author.doc().edits).length, 20, "nothing comes through");
  assert.equal(Object.keys(reader.doc().edits).length, 20, "nothing comes through");

  await cables.cut();
  await Promise.all([edit(author, here, "here, cut"), edit(reader, there, "there, cut")]);
  await assert.rejects(there.repo.find(made.url), /unavailable/);
  assert.equal(Object.keys(author.doc().edits).length, 40);
  assert.equal(Object.keys(reader.doc().edits).length, 40);

  await cables.heal();
  await converged(author, reader);
  assert.equal(Object.keys(author.doc().edits).length, 80, "no edit of either side is lost");
  assert.deepEqual(reader.doc(), author.doc());
  const late = await scene.client({ region: scene.regions[1] }).repo.find(made.url);
  assert.deepEqual(late.doc(), { made: "in the partition" });
  await agree(scene);
});

acrossRegions(2, "what waited in a link that hung arrives when it goes on", async scene => {
  const [here, there] = oneClientEach(scene);
  const author = here.repo.create({ count: 0 });
  await here.saved(author);
  const reader = await there.repo.find(author.url);
  scene.mesh.between().hang();
  for (let count = 1; count <= 200; count++) author.change(doc => (doc.count = count));
  await here.saved(author);
  assert.equal(reader.doc().count, 0);
  await scene.mesh.between().heal();
  await converged(author, reader);
  assert.equal(reader.doc().count, 200);
});

acrossRegions(2, "presence goes to the other region and back, also after a partition", async scene => {
  const [here, there] = oneClientEach(scene);
  const author = here.repo.create({ open: true });
  await here.saved(author);
  const reader = await there.repo.find(author.url);
  const heard = new Map([author, reader].map(handle => [handle, []]));
  for (const [handle, messages] of heard) handle.on("ephemeral-message", ({ message }) => messages.push(message));
  const passes = (from, to, text) =>
    until(async () => {
      // Which documents are open in a region is told to others now and then; presence before that is lost.
      from.broadcast(text);
      await new Promise(resolve => setTimeout(resolve, 50));
      return heard.get(to).includes(text);
    }, `the presence "${text}"`);

  await passes(author, reader, "hello");
  await passes(reader, author, "and to you");
  await scene.mesh.between().cut();
  author.broadcast("lost");
  await scene.mesh.between().heal();
  await passes(author, reader, "again");
  await passes(reader, author, "at last");
  assert.ok(heard.get(author).every(text => ["and to you", "at last"].includes(text)), "nobody hears himself");
  assert.ok(!heard.get(reader).includes("lost"), "presence is not kept for later");
});

acrossRegions(2, "a deleted document is gone in every region and does not come back", async scene => {
  const [here, there] = oneClientEach(scene);
  const doomed = here.repo.create({ text: "to be deleted" });
  const spared = here.repo.create({ text: "to be kept" });
  await here.saved(doomed);
  await here.saved(spared);
  const link = await scene.link(scene.regions[1]);
  const absent = scene.client({ link });
  const copy = await absent.repo.find(doomed.url);
  await link.cut();
  await until(() => absent.repo.peers.length === 0, "the client to be offline");
  copy.change(doc => (doc.edited = "offline"));

  const { status } = await scene.region.admin(`/admin/v1/documents/${doomed.documentId}`, { method: "DELETE" });
  assert.equal(status, 204);
  for (const region of scene.regions) await gone(scene, region, doomed.url);

  await link.heal();
  await until(() => absent.repo.peers.length > 0, "the client to be back");
  copy.change(doc => (doc.edited = "online"));
  // On the same connection, so that what it sent of the deleted document was read before.
  const after = absent.repo.create({ text: "made after the return" });
  await absent.saved(after);
  const reader = await here.repo.find(after.url);
  assert.deepEqual(reader.doc(), { text: "made after the return" });
  for (const region of scene.regions) await gone(scene, region, doomed.url);
  assert.deepEqual((await there.repo.find(spared.url)).doc(), { text: "to be kept" });
});

acrossRegions(2, "a region that dies loses nothing it acknowledged, and its client moves", async scene => {
  const [home, away] = scene.regions;
  const acknowledged = new Map();
  const writers = [0, 1].map(() => {
    const client = scene.client({ region: home, sturdy: true });
    client.onHeads((documentId, heads) => {
      acknowledged.set(documentId, [...(acknowledged.get(documentId) ?? []), ...heads]);
    });
    return client;
  });
  const [moving, leaving] = writers.map(client => client.repo.create({ count: 0 }));
  await Promise.all([writers[0].saved(moving), writers[1].saved(leaving)]);
  const timer = setInterval(() => [moving, leaving].forEach(handle => handle.change(doc => (doc.count += 1))), 2);
  const known = () => new Set(acknowledged.get(leaving.documentId)).size;
  await until(() => known() > 40, "acknowledgements under load");
  await home.kill();
  clearInterval(timer);
  // What this one alone has is only as safe as the region that acknowledged it.
  await scene.leave(writers[1]);
  const promised = acknowledged.get(leaving.documentId);

  await until(() => writers[0].repo.peers.length === 0, "the client to notice");
  writers[0].moveTo(away);
  await until(() => writers[0].repo.peers.length > 0, "the client to be in the other region");
  moving.change(doc => (doc.moved = true));
  await writers[0].saved(moving);

  await home.start();
  const other = scene.client({ region: away });
  const rest = await other.repo.find(leaving.url);
  const missing = () => promised.filter(hash => !changeHashes(rest).has(hash));
  await until(() => missing().length === 0, () => `${missing().length} acknowledged changes`);

  const back = scene.client({ region: home });
  const found = await back.repo.find(moving.url);
  await converged(found, moving);
  assert.equal(found.doc().moved, true);
  await agree(scene);
});

acrossRegions(2, "a region that is put back to an older copy gets its lost changes from the other", async scene => {
  const [home, away] = scene.regions;
  const writer = scene.client({ region: home });
  const old = writer.repo.create({ log: ["before the copy"] });
  await writer.saved(old);
  const watcher = scene.client({ region: away });
  const watched = await watcher.repo.find(old.url);
  await home.stop();
  await scene.databases[0].copy();
  await home.start();

  old.change(doc => doc.log.push("after the copy"));
  await until(() => writer.repo.peers.length > 0, "the writer to be back");
  const young = writer.repo.create({ made: "after the copy" });
  await writer.saved(young);
  await writer.saved(old);
  await converged(old, watched);
  const elsewhere = await watcher.repo.find(young.url);
  // Nobody but the other region has it when the copy is put back.
  await agree(scene);
  await scene.leave(writer);
  await home.stop();
  await scene.databases[0].restore();
  await home.start();

  const reader = scene.client({ region: home });
  await scene.mesh.linked();
  const [oldAgain, youngAgain] = await Promise.all([old, young].map(({ url }) => reader.repo.find(url)));
  await converged(oldAgain, watched);
  assert.deepEqual(oldAgain.doc(), { log: ["before the copy", "after the copy"] });
  assert.deepEqual(youngAgain.doc(), { made: "after the copy" });

  // What is written from now on goes both ways: no seq of the lost log was used again.
  oldAgain.change(doc => doc.log.push("after the restoration"));
  elsewhere.change(doc => (doc.answered = true));
  await converged(oldAgain, watched);
  await converged(youngAgain, elsewhere);
  assert.deepEqual(watched.doc().log, ["before the copy", "after the copy", "after the restoration"]);
  await agree(scene);
  for (const region of scene.regions) assert.deepEqual((await convergence(region)).forked_origins, []);
});

acrossRegions(3, "a third region relays between two whose link is cut", async scene => {
  const [first, second] = scene.regions;
  const [here, there, between] = oneClientEach(scene);
  const author = here.repo.create({ here: 0, there: 0 });
  await here.saved(author);
  const reader = await there.repo.find(author.url);

  await scene.mesh.between(first, second).cut();
  await until(async () => !(await first.peers()).includes(second.name), "the direct link to be noticed as gone");
  author.change(doc => (doc.here = 1));
  reader.change(doc => (doc.there = 1));
  await converged(author, reader);
  assert.deepEqual(reader.doc(), { here: 1, there: 1 });

  // Made while the two cannot speak to each other: only the linked regions are asked, so it may come a moment later.
  const made = here.repo.create({ made: "behind the cut" });
  await here.saved(made);
  const found = await there.repo.find(made.url, { allowableStates: ["ready", "unavailable"] });
  await until(() => found.isReady(), "the document to come round");
  assert.deepEqual(found.doc(), { made: "behind the cut" });
  assert.deepEqual((await between.repo.find(author.url)).doc(), { here: 1, there: 1 });

  await scene.mesh.between(first, second).heal();
  await scene.mesh.linked();
  author.change(doc => (doc.here = 2));
  await converged(author, reader);
  await agree(scene);
});

function oneClientEach(scene) {
  return scene.regions.map(region => scene.client({ region }));
}

/** The documents that a client was told are unavailable. */
function unavailable(client) {
  return client.received.filter(({ type }) => type === "doc-unavailable").map(({ documentId }) => documentId);
}

/** Waits until new clients of the region are told that there is no such document. */
async function gone(scene, region, url) {
  await until(async () => {
    const client = scene.client({ region });
    const found = await client.repo.find(url, { allowableStates: ["ready", "unavailable"] });
    await scene.leave(client);
    return found.state === "unavailable";
  }, `${url} to be gone in ${region.name}`);
}

async function convergence(region) {
  const response = await region.admin("/admin/v1/convergence");
  assert.equal(response.status, 200);
  return response.json();
}

/** Waits until every region has stored the same of every log, which is more than that one document converges. */
async function agree(scene) {
  let vectors;
  await until(async () => {
    const answers = await Promise.all(scene.regions.map(convergence));
    vectors = answers.map(({ vector }) => JSON.stringify(Object.entries(vector).filter(([, seq]) => seq > 0).sort()));
    return vectors.every(vector => vector === vectors[0]);
  }, () => `the regions to hold the same: ${vectors.join(" and ")}`);
}
