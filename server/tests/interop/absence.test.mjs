// Documents that are not there: never made, not yet made, or deleted by the client that asks.

import assert from "node:assert/strict";

import { generateAutomergeUrl, parseAutomergeUrl } from "@automerge/automerge-repo";

import { converged } from "./client.mjs";
import { onEachDatabase } from "./scene.mjs";
import { until } from "./until.mjs";

// A client that is left without an answer gives up after a minute.
const QUICKLY_MS = 5_000;

onEachDatabase("an unknown document is unavailable quickly", async scene => {
  const reader = scene.client();
  const asked = performance.now();
  await assert.rejects(reader.repo.find(generateAutomergeUrl()), /unavailable/);
  assert.ok(performance.now() - asked < QUICKLY_MS, `took ${performance.now() - asked} ms`);
  assert.deepEqual(
    reader.received.map(message => message.type),
    ["doc-unavailable"],
  );
});

onEachDatabase("two clients that ask for the same unknown document both get the answer", async scene => {
  const url = generateAutomergeUrl();
  const asked = performance.now();
  await Promise.all([scene.client(), scene.client()].map(client => assert.rejects(client.repo.find(url), /unavailable/)));
  assert.ok(performance.now() - asked < QUICKLY_MS, `took ${performance.now() - asked} ms`);
});

onEachDatabase("an unavailable document arrives by itself when another client creates it", async scene => {
  const author = scene.client();
  const donor = scene.client({ link: await cutLink(scene) });
  const made = donor.repo.create({ late: true });

  const reader = await scene.client().repo.find(made.url, { allowableStates: ["ready", "unavailable"] });
  assert.equal(reader.state, "unavailable");

  const copy = author.repo.import(await donor.repo.export(made.url), { docId: made.documentId });
  await author.saved(copy);
  await until(() => reader.isReady(), "the handle to become ready");
  assert.deepEqual(reader.doc(), { late: true });

  reader.change(doc => (doc.answered = true));
  await converged(reader, copy);
});

onEachDatabase("a document that was deleted locally is fetched again on the same connection", async scene => {
  const writer = scene.client();
  const author = writer.repo.create({ text: "kept by the region" });
  await writer.saved(author);

  const reader = scene.client();
  const found = await reader.repo.find(author.url);
  reader.repo.delete(author.url);
  assert.ok(found.isDeleted());

  const again = await reader.repo.find(author.url);
  assert.deepEqual(again.doc(), { text: "kept by the region" });
  assert.notEqual(again, found);

  author.change(doc => (doc.edited = true));
  await converged(author, again);
  again.change(doc => (doc.answered = true));
  await converged(author, again);
  assert.deepEqual(author.doc(), { text: "kept by the region", edited: true, answered: true });
});

onEachDatabase("the author of a document may delete its copy and fetch it back", async scene => {
  const writer = scene.client();
  const author = writer.repo.create({ kept: true });
  await writer.saved(author);
  writer.repo.delete(author.url);
  const again = await writer.repo.find(author.url);
  assert.deepEqual(again.doc(), { kept: true });
});

onEachDatabase("the document id on the wire is the one in the address", async scene => {
  const writer = scene.client();
  const author = writer.repo.create({});
  author.change(doc => (doc.edited = true));
  await writer.saved(author);
  const named = new Set(writer.received.map(message => message.documentId));
  assert.deepEqual([...named], [parseAutomergeUrl(author.url).documentId]);
});

/** A link that leads nowhere: its client is offline from the start. */
async function cutLink(scene) {
  const link = await scene.link();
  await link.cut();
  return link;
}
