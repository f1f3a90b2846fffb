// A js-libp2p node for the interop tests. It listens and prints {"listen": ADDR}; then it obeys one JSON command a
// line on its standard input ({"dial": ADDR}, {"addrs": true}, {"quit": true}) and prints one JSON answer a line.
// Its argument is JSON: {"listen": [ADDR, ...]} instead of a port on loopback, {"relay": true} to relay for
// others, {"dcutr": true} to turn relayed connections into direct ones.

// libp2p 3 uses Promise.withResolvers, which node has from version 22 on.
Promise.withResolvers ??= function () {
  let resolve, reject
  const promise = new Promise((res, rej) => { resolve = res; reject = rej })
  return { promise, resolve, reject }
}

// A dial by WebSocket uses the browser's class, which node has from version 22 on.
globalThis.WebSocket ??= (await import('ws')).WebSocket

const { createInterface } = await import('node:readline')
const { createLibp2p } = await import('libp2p')
const { tcp } = await import('@libp2p/tcp')
const { webSockets } = await import('@libp2p/websockets')
const { noise } = await import('@chainsafe/libp2p-noise')
const { yamux } = await import('@chainsafe/libp2p-yamux')
const { identify } = await import('@libp2p/identify')
const { ping } = await import('@libp2p/ping')
const { circuitRelayServer, circuitRelayTransport } = await import('@libp2p/circuit-relay-v2')
const { dcutr } = await import('@libp2p/dcutr')
const { multiaddr } = await import('@multiformats/multiaddr')

const ECHO = '/mycel-test/echo/1'
const options = JSON.parse(process.argv[2] ?? '{}')
const say = (answer) => process.stdout.write(JSON.stringify(answer) + '\n')

const node = await createLibp2p({
  addresses: { listen: options.listen ?? ['/ip4/127.0.0.1/tcp/0'] },
  transports: [tcp(), webSockets(), circuitRelayTransport()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  services: {
    identify: identify(),
    ping: ping(),
    ...(options.relay && { relay: circuitRelayServer() }),
    ...(options.dcutr && { dcutr: dcutr() })
  },
  connectionGater: { denyDialMultiaddr: () => false }
})

await node.handle(ECHO, async (stream) => {
  for await (const data of stream) {
    if (!stream.send(data)) await stream.onDrain()
  }
  await stream.close()
}, { runOnLimitedConnection: true })

async function echo (connection, size) {
  const stream = await connection.newStream(ECHO, { runOnLimitedConnection: true })
  const sent = new Uint8Array(size).map((_, i) => i % 251)
  const write = (async () => {
    for (let at = 0; at < size; at += 16384) {
      if (!stream.send(sent.subarray(at, at + 16384))) await stream.onDrain()
    }
    await stream.close()
  })()
  let at = 0
  for await (const piece of stream) {
    for (const byte of piece.subarray()) {
      if (byte !== sent[at++]) throw new Error(`byte ${at - 1} came back changed`)
    }
  }
  await write
  return at
}

// The ping service finds no limited connection.
async function pingOver (connection) {
  const began = Date.now()
  const stream = await connection.newStream('/ipfs/ping/1.0.0', { runOnLimitedConnection: true })
  stream.send(new Uint8Array(32))
  for await (const _ of stream) break
  await stream.close()
  return Date.now() - began
}

async function dial ({ dial: address, large = 3_000_000, echo: echoes = true }) {
  const identified = Promise.withResolvers()
  const wanted = address.split('/').at(-1)
  node.addEventListener('peer:identify', (event) => {
    if (event.detail.peerId.toString() === wanted) identified.resolve(event.detail)
  })
  const connection = await node.dial(multiaddr(address), { runOnLimitedConnection: true })
  const said = await identified.promise
  let unknown = 'opened'
  try {
    await connection.newStream('/mycel-test/nobody/1', { runOnLimitedConnection: true })
  } catch (error) {
    unknown = error.name
  }
  return {
    peer: connection.remotePeer.toString(),
    limited: connection.limits != null,
    encryption: connection.encryption,
    muxer: connection.multiplexer,
    ping_ms: connection.limits ? await pingOver(connection) : await node.services.ping.ping(connection.remotePeer),
    agent: said.agentVersion,
    protocols: said.protocols,
    observed: said.observedAddr?.toString(),
    signed: said.signedPeerRecord?.addresses.map(String),
    echoed_small: echoes && await echo(connection, 5),
    echoed_large: echoes && await echo(connection, large),
    unknown
  }
}

say({ listen: node.getMultiaddrs()[0]?.toString() })
for await (const line of createInterface({ input: process.stdin })) {
  const command = JSON.parse(line)
  if (command.quit) break
  try {
    say(command.addrs ? node.getMultiaddrs().map(String) : await dial(command))
  } catch (error) {
    say({ error: String(error.stack ?? error) })
  }
}
await node.stop()
process.exit(0)
