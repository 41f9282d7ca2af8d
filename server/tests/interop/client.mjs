// A stock automerge-repo client, as an application would set it up, and what a test needs to see of it.

import * as Automerge from "@automerge/automerge";
import { Repo, decodeHeads } from "@automerge/automerge-repo";
import { WebSocketClientAdapter } from "@automerge/automerge-repo-network-websocket";
import { NodeFSStorageAdapter } from "@automerge/automerge-repo-storage-nodefs";

import { until } from "./until.mjs";

// The stock client waits five seconds; tests of reconnection need not. It also gives up an attempt to connect after
// this time, so that a much shorter one would never come through on a busy machine.
const RETRY_INTERVAL_MS = 500;

// The state of a WebSocket that takes messages.
const OPEN = 1;

/**
 * An adapter that drops what it cannot send, as later versions of the stock one do. That of 2.5.6 throws instead. When
 * a server dies between a message and the client's answer to it, this happens in the middle of applying the message,
 * and leaves the client with a document that it can neither read nor write any more. It also retries when the server
 * dies while a connection is being made; the stock one throws, which ends a Node process.
 */
class SturdyAdapter extends WebSocketClientAdapter {
  constructor(...settings) {
    super(...settings);
    const stock = this.onError;
    this.onError = event => {
      if (event.error?.code !== "ECONNRESET") stock(event);
    };
  }

  send(message) {
    if (this.socket?.readyState === OPEN) super.send(message);
  }
}

export class Client {
  /** Everything the server sent, in order, decoded as far as the adapter does. Bounded by the tests' length. */
  received = [];
  #Adapter;

  /**
   * `folder` gives the client a storage on disk; `gossip` lets it follow remote heads; `sturdy` lets it outlive the
   * sudden death of a server in any case.
   */
  constructor(url, { folder, gossip = false, sturdy = false, peerId } = {}) {
    this.#Adapter = sturdy ? SturdyAdapter : WebSocketClientAdapter;
    this.adapter = this.#connection(url);
    this.repo = new Repo({
      network: [this.adapter],
      storage: folder ? new NodeFSStorageAdapter(folder) : undefined,
      isEphemeral: folder === undefined,
      enableRemoteHeadsGossiping: gossip,
      peerId,
    });
  }

  #connection(url) {
    const adapter = new this.#Adapter(url, RETRY_INTERVAL_MS);
    adapter.on("message", message => this.received.push(message));
    return adapter;
  }

  /** Gives up the server it has, which must be gone, and connects to another with all that it holds. */
  moveTo(region) {
    this.#giveUp();
    this.adapter = this.#connection(region.url);
    this.repo.networkSubsystem.addNetworkAdapter(this.adapter);
    this.region = region;
  }

  /** Calls `listener(documentId, heads)` for each sync message: the server's heads, as change hashes. */
  onHeads(listener) {
    this.adapter.on("message", message => {
      if (message.type === "sync" || message.type === "request")
        listener(message.documentId, Automerge.decodeSyncMessage(message.data).heads);
    });
  }

  /** The region's storage id, once the handshake is done. */
  async regionStorageId() {
    await until(() => this.repo.peers.length > 0, "the handshake");
    return this.repo.peerMetadataByPeerId[this.repo.peers[0]]?.storageId;
  }

  /** Waits until the server has announced heads that equal the handle's: everything in it is stored. */
  async saved(handle) {
    const storageId = await this.regionStorageId();
    await until(() => {
      const saved = handle.getSyncInfo(storageId)?.lastHeads ?? [];
      return sameMembers(saved, handle.heads());
    }, `the acknowledgement of ${handle.documentId}`);
  }

  async close() {
    this.#giveUp();
    await this.repo.shutdown();
  }

  /** Ends attempts to connect: one that is scheduled already would take an interval of zero for "without pause". */
  #giveUp() {
    this.adapter.retryInterval = 0;
    this.adapter.connect = () => {};
  }
}

/** The hashes of every change in the handle's document. */
export function changeHashes(handle) {
  return new Set(Automerge.getAllChanges(handle.doc()).map(change => Automerge.decodeChange(change).hash));
}

/** The heads of a handle as plain change hashes. */
export function headHashes(handle) {
  return decodeHeads(handle.heads());
}

export function sameMembers(left, right) {
  return left.length === right.length && left.every(member => right.includes(member));
}

/** Waits until every handle shows the same heads, none of them empty. */
export async function converged(...handles) {
  const first = handles[0];
  await until(
    () => first.heads().length > 0 && handles.every(handle => sameMembers(handle.heads(), first.heads())),
    () => `${handles.length} copies of ${first.documentId} to converge: ${JSON.stringify(handles.map(h => h.doc()))}`,
  );
}
