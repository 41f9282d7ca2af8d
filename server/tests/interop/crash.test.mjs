// Kill -9 under load, over and over: every change that the server acknowledged is there when it is back.
//
// A change is acknowledged once its hash, or that of a change that depends on it, is among the heads of a sync
// message from the server. The checker notes those heads as they come in. After each kill the writers are kept
// away while a client with no memory reads every document from the restarted server, so that nothing can be
// quietly uploaded again by somebody who still has it. With several regions another client then reads them from each
// of the others.

import assert from "node:assert/strict";

import * as Automerge from "@automerge/automerge";

import { changeHashes, converged } from "./client.mjs";
import { onEachDatabase } from "./scene.mjs";
import { until } from "./until.mjs";

const ROUNDS = 4;
const WRITERS = 3;
const DOCUMENTS = 3;
const KILL_AFTER_MS = [400, 1_600];

onEachDatabase("no acknowledged change is lost when the server is killed under load", async (scene, t) => {
  const link = await scene.link(scene.region);
  const acknowledged = new Map();
  const writers = Array.from({ length: WRITERS }, () => writer(scene, link, acknowledged));
  const opened = await openDocuments(writers);
  let total = 0;

  for (let round = 1; round <= ROUNDS; round++) {
    const stopWriting = keepWriting(opened, round);
    const advancing = count(acknowledged);
    await until(() => count(acknowledged) > advancing + DOCUMENTS, "acknowledgements under load");
    const moment = KILL_AFTER_MS[0] + Math.random() * (KILL_AFTER_MS[1] - KILL_AFTER_MS[0]);
    await new Promise(resolve => setTimeout(resolve, moment));
    await scene.region.kill();
    await link.cut();
    stopWriting();

    await scene.region.start();
    total = await assertKeptEverywhere(scene, acknowledged);
    t.diagnostic(`round ${round}: killed after ${Math.round(moment)} ms, ${total} changes kept, none missing`);
    await link.heal();
    await until(() => writers.every(client => client.repo.peers.length > 0), "the writers to come back");
  }

  for (const copies of opened) await converged(...copies);
  for (const [at, client] of writers.entries()) for (const copies of opened) await client.saved(copies[at]);
  const final = await assertKeptEverywhere(scene, acknowledged);
  assert.equal(final, sum(opened.map(copies => changeHashes(copies[0]).size)), "what was not acknowledged came later");
  assert.ok(final >= total);
});

function writer(scene, link, acknowledged) {
  const client = scene.client({ link, sturdy: true });
  client.onHeads((documentId, heads) => {
    const known = acknowledged.get(documentId) ?? new Set();
    acknowledged.set(documentId, known);
    for (const head of heads) known.add(head);
  });
  return client;
}

/** The documents, each as its handles at every writer. */
async function openDocuments(writers) {
  const opened = [];
  for (let number = 0; number < DOCUMENTS; number++) {
    const handle = writers[number % writers.length].repo.create({ text: "", edits: {} });
    await writers[number % writers.length].saved(handle);
    opened.push(await Promise.all(writers.map(client => client.repo.find(handle.url))));
  }
  return opened;
}

/** Lets every writer edit every document until the returned function is called. */
function keepWriting(opened, round) {
  let edit = 0;
  const timer = setInterval(() => {
    edit += 1;
    for (const copies of opened)
      copies.forEach((handle, author) =>
        handle.change(doc => {
          doc.edits[author] = `${round}.${edit}`;
          Automerge.splice(doc, ["text"], (edit * 7) % (doc.text.length + 1), 0, String(author));
        }),
      );
  }, 10);
  return () => clearInterval(timer);
}

/** As [`assertKept`], in each region. Returns how many changes the first holds. */
async function assertKeptEverywhere(scene, acknowledged) {
  const held = await assertKept(scene, acknowledged, scene.region);
  await scene.mesh.linked();
  for (const region of scene.regions.slice(1)) await assertKept(scene, acknowledged, region);
  return held;
}

/** Reads every document with a new client and compares; returns how many changes the region holds. */
async function assertKept(scene, acknowledged, region) {
  const checker = scene.client({ region });
  const missing = (handle, heads) => {
    const present = changeHashes(handle);
    return [...heads].filter(head => !present.has(head));
  };
  let held = 0;
  for (const [documentId, heads] of acknowledged) {
    const handle = await checker.repo.find(documentId);
    // What another region acknowledged may still be on its way.
    if (region !== scene.region) await until(() => missing(handle, heads).length === 0, `all of ${documentId}`);
    assert.deepEqual(missing(handle, heads), [], `acknowledged changes of ${documentId} are missing`);
    const present = changeHashes(handle);
    held += present.size;
  }
  await scene.leave(checker);
  return held;
}

function count(acknowledged) {
  return sum([...acknowledged.values()].map(heads => heads.size));
}

function sum(numbers) {
  return numbers.reduce((left, right) => left + right, 0);
}
