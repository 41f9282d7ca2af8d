// Ephemeral messages: both ways, each once, to those who have the document open and nobody else.

import assert from "node:assert/strict";

import { onEachDatabase } from "./scene.mjs";
import { until } from "./until.mjs";

onEachDatabase("ephemeral messages go both ways, in order and once", async scene => {
  const left = scene.client();
  const near = left.repo.create({});
  near.change(doc => (doc.open = true));
  await left.saved(near);
  const far = await scene.client().repo.find(near.url);
  await hearing(scene, near, far);

  const heardNear = listen(near);
  const heardFar = listen(far);
  const count = 20;
  for (let index = 0; index < count; index++) {
    near.broadcast({ cursor: index });
    far.broadcast({ selection: [index, index + 3] });
  }
  // The last of each side has come through after all that went before it.
  await until(() => heardNear.length >= count && heardFar.length >= count, "the messages of both sides");
  near.broadcast("end");
  far.broadcast("end");
  await until(() => heardNear.at(-1) === "end" && heardFar.at(-1) === "end", "the last message of both sides");

  const numbers = [...Array(count).keys()];
  assert.deepEqual(heardFar, [...numbers.map(index => ({ cursor: index })), "end"]);
  assert.deepEqual(heardNear, [...numbers.map(index => ({ selection: [index, index + 3] })), "end"]);
});

onEachDatabase("three clients hear each other and never themselves", async scene => {
  const clients = [scene.client(), scene.client(), scene.client()];
  const first = clients[0].repo.create({});
  first.change(doc => (doc.open = true));
  await clients[0].saved(first);
  const handles = [first, await clients[1].repo.find(first.url), await clients[2].repo.find(first.url)];
  await hearing(scene, ...handles);
  const heard = handles.map(listen);

  handles.forEach((handle, author) => handle.broadcast({ author }));
  await until(() => heard.every(messages => messages.length >= 2), "each to hear the two others");
  handles.forEach((handle, author) => handle.broadcast({ author, last: true }));
  await until(() => heard.every(messages => messages.length >= 4), "each to hear the two others again");

  heard.forEach((messages, self) => {
    assert.equal(messages.length, 4, `client ${self} heard ${JSON.stringify(messages)}`);
    assert.ok(messages.every(message => message.author !== self));
  });
});

onEachDatabase("ephemeral messages stay within their document", async scene => {
  const writer = scene.client();
  const open = writer.repo.create({ name: "open" });
  const other = writer.repo.create({ name: "other" });
  await writer.saved(open);
  await writer.saved(other);

  const reader = scene.client();
  const found = await reader.repo.find(open.url);
  await hearing(scene, open, found);
  const heard = listen(found);
  other.broadcast("not for you");
  open.broadcast("for you");
  await until(() => heard.length > 0, "the message of the open document");
  assert.deepEqual(heard, ["for you"]);
  const strangers = reader.received.filter(message => message.documentId !== open.documentId);
  assert.deepEqual(strangers, []);
});

function listen(handle) {
  const messages = [];
  handle.on("ephemeral-message", ({ message }) => {
    if (message.hearing === undefined) messages.push(message);
  });
  return messages;
}

/**
 * Waits until these clients hear each other. A region learns with some delay which documents are open in another, and
 * sends presence of no others; within a region there is nothing to wait for.
 */
async function hearing(scene, ...handles) {
  if (scene.regions.length === 1) return;
  const heard = handles.map(() => new Set());
  handles.forEach((handle, self) => handle.on("ephemeral-message", ({ message }) => heard[self].add(message.hearing)));
  await until(async () => {
    handles.forEach((handle, author) => handle.broadcast({ hearing: author }));
    await new Promise(resolve => setTimeout(resolve, 50));
    return heard.every((authors, self) => handles.every((_, author) => author === self || authors.has(author)));
  }, "the clients to hear each other");
}
