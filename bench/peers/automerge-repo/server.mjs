// The stock Automerge sync server, on the automerge-repo that package.json names: what the published
// sync-server package does, without its web page. Reads PORT and DATA_DIR from the environment.
import { createServer } from "node:http"
import { WebSocketServer } from "ws"
import { Repo } from "@automerge/automerge-repo"
import { NodeWSServerAdapter } from "@automerge/automerge-repo-network-websocket"
import { NodeFSStorageAdapter } from "@automerge/automerge-repo-storage-nodefs"

const server = createServer((_, response) => response.end("ok"))
const sockets = new WebSocketServer({ server })
new Repo({
  network: [new NodeWSServerAdapter(sockets)],
  storage: new NodeFSStorageAdapter(process.env.DATA_DIR),
  peerId: "storage-server-bench",
  // Documents are sent to those who ask for them, and announced to nobody.
  sharePolicy: async () => false,
})
server.listen(Number(process.env.PORT), "127.0.0.1")
