// Documents between clients that stay connected: made, found, edited at once, many on one socket, and large.

import assert from "node:assert/strict";

import * as Automerge from "@automerge/automerge";

import { changeHashes, converged, sameMembers } from "./client.mjs";
import { onEachDatabase } from "./scene.mjs";
import { until } from "./until.mjs";

onEachDatabase("a document that one client creates is found by another", async scene => {
  const writer = scene.client();
  const author = writer.repo.create({ title: "isobars", pressures: [1013, 987] });
  await writer.saved(author);

  const reader = await scene.client().repo.find(author.url);
  assert.deepEqual(reader.doc(), { title: "isobars", pressures: [1013, 987] });
  assert.deepEqual(reader.heads(), author.heads());
});

onEachDatabase("a document is found although its author has left", async scene => {
  const writer = scene.client();
  const author = writer.repo.create({ kept: true });
  await writer.saved(author);
  await scene.leave(writer);

  const reader = await scene.client().repo.find(author.url);
  assert.deepEqual(reader.doc(), { kept: true });
});

onEachDatabase("concurrent edits by several clients converge and none is lost", async scene => {
  const writers = [scene.client(), scene.client(), scene.client(), scene.client()];
  const first = writers[0].repo.create({ done: {}, text: "" });
  await writers[0].saved(first);
  const handles = [first];
  for (const writer of writers.slice(1)) handles.push(await writer.repo.find(first.url));

  const edits = 25;
  await Promise.all(
    handles.map(async (handle, author) => {
      for (let edit = 0; edit < edits; edit++) {
        handle.change(doc => {
          doc.done[`${author}.${edit}`] = true;
          Automerge.splice(doc, ["text"], doc.text.length, 0, String(author));
        });
        await new Promise(setImmediate);
      }
    }),
  );

  await until(
    () => handles.every(handle => Object.keys(handle.doc().done).length === writers.length * edits),
    "every edit to reach every client",
  );
  await converged(...handles);
  for (const handle of handles) assert.equal(handle.doc().text, first.doc().text);
  for (const author of writers.keys())
    assert.equal(first.doc().text.split(String(author)).length - 1, edits, `characters of author ${author}`);

  const late = await scene.client().repo.find(first.url);
  assert.deepEqual(late.doc(), first.doc());
});

onEachDatabase("a hundred documents share one socket and do not mix", async scene => {
  const writer = scene.client();
  const authored = Array.from({ length: 100 }, (_, number) => writer.repo.create({ number, edits: 0 }));
  for (const handle of authored) await writer.saved(handle);

  const reader = scene.client();
  const found = await Promise.all(authored.map(handle => reader.repo.find(handle.url)));
  found.forEach((handle, number) => assert.deepEqual(handle.doc(), { number, edits: 0 }));

  found.forEach(handle => handle.change(doc => (doc.edits += 1)));
  await until(() => authored.every(handle => handle.doc().edits === 1), "each document's edit to come back");
  authored.forEach((handle, number) => assert.deepEqual(handle.doc(), { number, edits: 1 }));
});

onEachDatabase("a client is sent only the documents it asked for", async scene => {
  const writer = scene.client();
  const secret = writer.repo.create({ secret: true });
  const shared = writer.repo.create({ secret: false });
  await writer.saved(secret);
  await writer.saved(shared);

  const reader = scene.client();
  const found = await reader.repo.find(shared.url);
  secret.change(doc => (doc.edited = true));
  shared.change(doc => (doc.edited = true));
  await writer.saved(secret);
  await converged(found, shared);

  const documents = new Set(reader.received.map(message => message.documentId));
  assert.deepEqual([...documents], [shared.documentId]);
});

onEachDatabase("text edits arrive character for character", async scene => {
  const left = scene.client();
  const near = left.repo.create({ text: "pressure" });
  await left.saved(near);
  const far = await scene.client().repo.find(near.url);

  near.change(doc => Automerge.splice(doc, ["text"], 0, 0, "high "));
  far.change(doc => Automerge.splice(doc, ["text"], 8, 0, " falls"));
  await converged(near, far);
  assert.equal(near.doc().text, "high pressure falls");

  near.change(doc => Automerge.splice(doc, ["text"], 0, 5));
  far.change(doc => Automerge.updateText(doc, ["text"], `${doc.text} — 🌀 über`));
  await until(() => near.doc().text === far.doc().text && near.doc().text.endsWith("über"), "both edits");
  await converged(near, far);
  assert.equal(near.doc().text, "pressure falls — 🌀 über");
});

onEachDatabase("a document of 20,000 changes reaches a cold client byte for byte", async scene => {
  const changes = 20_000;
  const live = 2_000;
  const writer = scene.client();
  const built = typed(Automerge.from({ text: "" }), 0, changes - live);
  const author = writer.repo.import(Automerge.save(built));
  await author.whenReady();
  await writer.saved(author);

  // The rest arrives as an editor sends it: change by change, a few in each message.
  for (let from = changes - live; from < changes; from += 100) {
    author.update(doc => typed(doc, from, from + 100));
    await new Promise(setImmediate);
  }
  await writer.saved(author);
  await scene.leave(writer);

  const cold = await scene.client().repo.find(author.url);
  await scene.caughtUp(cold, author);
  assert.equal(cold.doc().text, author.doc().text);
  assert.equal(cold.doc().text.length, changes);
  assert.ok(sameMembers(cold.heads(), author.heads()));
  assert.equal(changeHashes(cold).size, changes + 1);
});

/** Types characters number `from` to `to`, jumping back now and then, each as a change of its own. */
function typed(doc, from, to) {
  for (let index = from; index < to; index++) {
    const at = index % 97 === 0 ? Math.floor(index / 2) : index;
    doc = Automerge.change(doc, d => Automerge.splice(d, ["text"], at, 0, String.fromCharCode(97 + (index % 26))));
  }
  return doc;
}
