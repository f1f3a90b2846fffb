// A js-libp2p node for the interop tests. It listens and prints {"listen": ADDR}; then it obeys one JSON command a
// line on its standard input ({"dial": ADDR}, {"addrs": true}, {"quit": true}) and prints one JSON answer a line.
// Its argument is JSON: {"listen": [ADDR, ...]} instead of a port on loopback, {"relay": true} to relay for
// others, {"dcutr": true} to turn relayed connections into direct ones, {"kad": true} to be a Kademlia server, which
// puts a record of its own ({"put": NAME, "value": TEXT}) and gets anybody's ({"get": NAME, "author": PEERID}).

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
const { kadDHT, passthroughMapper } = await import('@libp2p/kad-dht')
const { generateKeyPair } = await import('@libp2p/crypto/keys')
const { multiaddr } = await import('@multiformats/multiaddr')

const ECHO = '/mycel-test/echo/1'
const options = JSON.parse(process.argv[2] ?? '{}')
const say = (answer) => process.stdout.write(JSON.stringify(answer) + '\n')

const privateKey = await generateKeyPair('Ed25519')
const node = await createLibp2p({
  privateKey,
  addresses: { listen: options.listen ?? ['/ip4/127.0.0.1/tcp/0'] },
  transports: [tcp(), webSockets(), circuitRelayTransport()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  services: {
    identify: identify(),
    ping: ping(),
    ...(options.relay && { relay: circuitRelayServer() }),
    ...(options.dcutr && { dcutr: dcutr() }),
    ...(options.kad && {
      kad: kadDHT({
        protocol: '/ipfs/kad/1.0.0',
        clientMode: false,
        peerInfoMapper: passthroughMapper,
        validators: { mycel: async () => {} },
        selectors: { mycel: (_, records) => records.length - 1 }
      })
    })
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

const bytes = (text) => new TextEncoder().encode(text)
const u64 = (number) => { const out = Buffer.alloc(8); out.writeBigUInt64BE(BigInt(number)); return out }
const nameOf = (author, name) => bytes(`/mycel/${author}/${name}`)

// A record as docs/protocol.md has it; lengths here stay under 128, so a varint is one byte.
async function put ({ put: name, value, sequence = 1, life_s: life = 600 }) {
  const key = nameOf(node.peerId, name)
  const expires = Date.now() + life * 1000
  const parts = [bytes('mycel-record'), key, u64(sequence), u64(expires), bytes(value)]
  const signature = await privateKey.sign(Buffer.concat(parts.flatMap((part) => [Buffer.of(part.length), part])))
  const record = Buffer.concat([
    Buffer.of(0x95, 1, 0xcf), u64(sequence), Buffer.of(0xcf), u64(expires),
    Buffer.of(0xc4, value.length), bytes(value), Buffer.of(0xc4, signature.length), signature
  ])
  const errors = []
  let answered = 0
  for await (const event of node.services.kad.put(key, record)) {
    if (event.name === 'PEER_RESPONSE' && event.messageName === 'PUT_VALUE') answered++
    if (event.name === 'QUERY_ERROR') errors.push(String(event.error))
  }
  return { answered, errors }
}

async function get ({ get: name, author }) {
  for await (const event of node.services.kad.get(nameOf(author, name))) {
    if (event.name === 'VALUE') return { record: Buffer.from(event.value).toString('hex') }
  }
  return { record: null }
}

async function obey (command) {
  if (command.addrs) return node.getMultiaddrs().map(String)
  if (command.put) return await put(command)
  if (command.get) return await get(command)
  return await dial(command)
}

say({ listen: node.getMultiaddrs()[0]?.toString() })
for await (const line of createInterface({ input: process.stdin })) {
  const command = JSON.parse(line)
  if (command.quit) break
  try {
    say(await obey(command))
  } catch (error) {
    say({ error: String(error.stack ?? error) })
  }
}
await node.stop()
process.exit(0)
