// Dials the node at argv[2], pings it, reads what it says of itself, and has argv[3] bytes echoed.
// argv[4], where given, is the key file of a private network.
// Prints one JSON object.

// Node 20 lacks these; the library counts on them.
Promise.withResolvers ??= function () {
  const found = {}
  found.promise = new Promise((resolve, reject) => Object.assign(found, { resolve, reject }))
  return found
}
globalThis.WebSocket ??= class {}

const { readFileSync } = await import('node:fs')
const { createLibp2p } = await import('libp2p')
const { tcp } = await import('@libp2p/tcp')
const { noise } = await import('@chainsafe/libp2p-noise')
const { yamux } = await import('@chainsafe/libp2p-yamux')
const { identify } = await import('@libp2p/identify')
const { ping } = await import('@libp2p/ping')
const { multiaddr } = await import('@multiformats/multiaddr')

const [, , address, size, keyFile] = process.argv
const protector = {}
if (keyFile) {
  const { preSharedKey } = await import('@libp2p/pnet')
  protector.connectionProtector = preSharedKey({ psk: readFileSync(keyFile) })
}
const node = await createLibp2p({
  ...protector,
  transports: [tcp()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  connectionGater: { denyDialMultiaddr: () => false },
  services: { identify: identify(), ping: ping() }
})

const identified = new Promise(resolve => {
  node.addEventListener('peer:identify', event => resolve(event.detail))
})
const target = multiaddr(address)
const connection = await node.dial(target)
const pingMs = await node.services.ping.ping(target)
const said = await identified

const stream = await connection.newStream('/test/echo/1')
const sent = new Uint8Array(Number(size)).map((_, at) => (at * 31) % 251)
let echoed = 0
let same = true
const whole = new Promise(resolve => {
  stream.addEventListener('message', event => {
    for (const byte of event.data.subarray()) {
      same &&= byte === sent[echoed]
      echoed += 1
    }
    if (echoed >= sent.length) resolve()
  })
})
for (let at = 0; at < sent.length; at += 32768) {
  if (!stream.send(sent.subarray(at, at + 32768))) await stream.onDrain()
}
await whole
await stream.close()
console.log(JSON.stringify({
  peer: connection.remotePeer.toString(),
  pingMs,
  agent: said.agentVersion,
  protocols: said.protocols,
  echoed,
  same
}))
await node.stop()
