// Preloaded into peers that would listen on every interface: a bare port number means loopback here.
const net = require("node:net")
const listen = net.Server.prototype.listen
net.Server.prototype.listen = function (port, ...rest) {
  if (typeof port === "number" && typeof rest[0] !== "string") rest.unshift("127.0.0.1")
  return listen.call(this, port, ...rest)
}
