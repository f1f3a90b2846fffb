// A js-libp2p node for the interop test. It listens and prints {"listen": ADDR}; then it obeys one JSON command a
// line on its standard input ({"dial": ADDR}, {"quit": true}) and prints one JSON answer a line.

// libp2p 3 uses Promise.withResolvers, which node has from version 22 on.
Promise.withResolvers ??= function () {
  let resolve, reject
  const promise = new Promise((res, rej) => { resolve = res; reject = rej })
  return { promise, resolve, reject }
}

const { createInterface } = await import('node:readline')
const { createLibp2p } = await import('libp2p')
const { tcp } = await import('@libp2p/tcp')
const { noise } = await import('@chainsafe/libp2p-noise')
const { yamux } = await import('@chainsafe/libp2p-yamux')
const { identify } = await import('@libp2p/identify')
const { ping } = await import('@libp2p/ping')
const { multiaddr } = await import('@multiformats/multiaddr')

const ECHO = '/mycel-test/echo/1'
const say = (answer) => process.stdout.write(JSON.stringify(answer) + '\n')

const node = await createLibp2p({
  addresses: { listen: ['/ip4/127.0.0.1/tcp/0'] },
  transports: [tcp()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  services: { identify: identify(), ping: ping() },
  connectionGater: { denyDialMultiaddr: () => false }
})

await node.handle(ECHO, async (stream) => {
  for await (const data of stream) {
    if (!stream.send(data)) await stream.onDrain()
  }
  await stream.close()
})

async function echo (connection, size) {
  const stream = await connection.newStream(ECHO)
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

async function dial (address) {
  const identified = Promise.withResolvers()
  node.addEventListener('peer:identify', (event) => identified.resolve(event.detail), { once: true })
  const connection = await node.dial(multiaddr(address))
  const said = await identified.promise
  let unknown = 'opened'
  try {
    await connection.newStream('/mycel-test/nobody/1')
  } catch (error) {
    unknown = error.name
  }
  return {
    peer: connection.remotePeer.toString(),
    encryption: connection.encryption,
    muxer: connection.multiplexer,
    ping_ms: await node.services.ping.ping(connection.remotePeer),
    agent: said.agentVersion,
    protocols: said.protocols,
    observed: said.observedAddr?.toString(),
    signed: said.signedPeerRecord?.addresses.map(String),
    echoed_small: await echo(connection, 5),
    echoed_large: await echo(connection, 3_000_000),
    unknown
  }
}

say({ listen: node.getMultiaddrs()[0].toString() })
for await (const line of createInterface({ input: process.stdin })) {
  const command = JSON.parse(line)
  if (command.quit) break
  try {
    say(await dial(command.dial))
  } catch (error) {
    say({ error: String(error.stack ?? error) })
  }
}
await node.stop()
process.exit(0)
