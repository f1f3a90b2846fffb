"""What a node can be told: one frozen dataclass, its presets, and what makes a value unusable.

`mycel.node.settings` says in which order flags, environment and file are heard. A test or a simulation
builds a `Config` directly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from multiaddr import Multiaddr

from mycel.protocol.errors import UsageProblem
from mycel.protocol.limits import DEFAULT_LIMITS, MIB, Limits
from mycel.protocol.limits_reach import DEFAULT_RELAY_LIMITS, RelayLimits

DEFAULT_HOME = "~/.mycel"


class ConfigError(UsageProblem):
    """A setting that cannot be used. The text names the setting, where it came from, and what would do."""


@dataclass(frozen=True, slots=True)
class Config:
    """One node's settings. Sizes are bytes, times seconds; texts such as "8GiB" are read as sizes."""

    home: Path = field(default_factory=lambda: Path(DEFAULT_HOME).expanduser())
    """The folder that holds the node's key, its membership, its config file and what it remembers of
    peers. One node, one home: to run several nodes on a machine give each its own."""

    preset: str = "lan"
    """local: this machine only (loopback, quick verdicts; for trying things out and for tests). lan: all
    interfaces of this machine, verdicts in seconds. wan: the same with deadlines for slow, lossy links.
    A preset only changes defaults; every field below may still be set by itself."""

    label: str = ""
    """A name for people, shown by `mycel peers`. It proves nothing. Empty: the machine's host name."""

    listen: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)
    """Multiaddrs to listen on. Port 0 means the port of last time, or any free one the first time, so that
    tickets stay good over a restart; name a port where a firewall must let it through."""

    web_certificate: str = ""
    """PEM file with the certificate chain for listening on /tls/ws (WebSocket in TLS, as on port 443). Not
    needed behind a web server that has one and forwards to a /ws address here."""

    web_key: str = ""
    """PEM file with that certificate's key."""

    mdns: bool = True
    """Find members on the local network by mDNS, and be found. What it tells everybody there: a peer id, a
    port, and a tag of the swarm."""

    port_mapping: bool = True
    """Ask the router (UPnP, NAT-PMP) to forward a port to this node, and give it back at exit."""

    announce: tuple[str, ...] = ()
    """Multiaddrs to tell others instead of the ones listened on: the public side of a forwarded port."""

    relay: str = "auto"
    """Whether this node carries connections between others: auto (where others can call it from outside),
    on (wherever it is; the owner knows better), or off."""

    relays: tuple[str, ...] = ()
    """Multiaddrs (each ending in /p2p/ID) of relays outside the swarm, to be reached through where too few
    members relay and this node cannot be called. Any libp2p relay (circuit v2) will do."""

    foreign_protocols: tuple[str, ...] = ()
    """Further protocols to serve to anybody: /ipfs/kad/1.0.0, libp2p's own Kademlia. Then whoever can dial
    this node may ask it, and it asks them; members' addresses and records are no secret then."""

    bootstrap: tuple[str, ...] = ()
    """Further multiaddrs (each ending in /p2p/ID) to dial besides those in the ticket. Useful when the
    machine that issued the ticket has moved."""

    api: str = "127.0.0.1:0"
    """HOST:PORT of the HTTP API (OpenAI's, metrics, and what the command line talks to). Port 0: the port of
    last time, else 4810 if free, else any. Beyond loopback an `api_token` is demanded."""

    api_token: str = ""
    """What clients must send as a bearer token (OpenAI clients: their api_key). Empty: no token, which is
    allowed on loopback only. Prefer the environment or the config file: flags show in process lists."""

    serve: tuple[str, ...] = ()
    """Models to lend layers of from the start, each MODEL or MODEL@i:j: a local directory, a name that
    members announce (`mycel models list`) or a hub id, and layers i up to, not including, j."""

    assign: bool = True
    """Take layers of models that the swarm runs, when asked for none by name and the model can be had: in
    `models`, or from members. Turn it off for a machine that shall only ask, never serve."""

    assign_from_members: bool = True
    """Whether layers that this node takes may be fetched from members that have the model as blocks. Where it
    is off, others' models are only looked for in `models`."""

    assign_from_hub: bool = False
    """Whether models that others name may be downloaded for that from the Hugging Face hub. Off, they are
    only looked for in `models`; what this machine's owner serves by name is fetched in any case."""

    models: tuple[str, ...] = ()
    """Folders to look in for models by name: NAME is found as FOLDER/NAME."""

    jobs: bool = True
    """Work for jobs that others submit, as far as this machine can. Off, it still votes on who coordinates a
    job, and coordinates those that it is chosen for: neither costs anything to speak of."""

    data: tuple[str, ...] = ()
    """What federated jobs may train on here, each NAME=PATH: a file or folder, by the name that jobs ask for.
    The data stay on this machine; what leaves it is what training makes of them."""

    trust_submitters: tuple[str, ...] = ()
    """Peer ids whose own code federated jobs may run here, in a process without this node's keys, but with
    this user's rights. Applications that come with Mycel need no trust."""

    stages: int = 0
    """Over how many peers a model should be spread. 0: as few as hold it. More stages than needed cost a
    hop each per token; ask for them to keep each peer's share small."""

    memory_bytes: int = 0
    """Memory for weights that this node lends. 0: half of what is free at the start."""

    blocks_bytes_max: int = 0
    """Disk for blocks: models that this node keeps or fetched, and what jobs left here. When it is full, what
    nobody named goes. 0: half of what is free. Files made of blocks to be loaded come on top."""

    upload_bytes_per_s: int = 0
    """Bytes per second for all blocks that are sent to others. 0: no bound."""

    lane_bytes_per_s: float = 0.0
    """Bytes per second that this node sends to the groups it computes in, all together. 0: no bound."""

    kv_bytes_max: int = 2048 * MIB
    """Memory for the key-value caches of all sessions together. A session that does not fit is refused."""

    device: str = "auto"
    """cpu, cuda, cuda:N, or auto (the first GPU, else the CPU)."""

    dtype: str = "auto"
    """float32, bfloat16, float16, or auto (as the checkpoint says)."""

    threads: int = 0
    """Cores for torch. 0: all that this process may use. Share them out when several nodes run on one
    machine, or they will slow each other down."""

    probe: str = "auto"
    """Whether this machine is measured: products and memory of its devices, and its line, by a few megabytes
    to and from two members an hour. auto: some time after the start, unless only this machine can reach the
    node; on: at once; off: never."""

    relay_reservations_max: int = DEFAULT_RELAY_LIMITS.reservations
    """Where this node relays: peers that may be reached through it. Strangers together get a quarter of this
    and of all that follows."""

    relay_circuits_max: int = DEFAULT_RELAY_LIMITS.circuits
    """Relayed connections at once. Each costs 1 MiB of memory at the very most."""

    relay_circuits_per_peer: int = DEFAULT_RELAY_LIMITS.circuits_per_peer
    """Relayed connections at once of any one peer."""

    relay_bytes_per_s: int = DEFAULT_RELAY_LIMITS.bytes_per_s
    """Bytes per second for all relayed connections together, either way. 0: no bound. Set it where this
    machine's line is slow or metered: whatever passes here comes in and goes out."""

    relay_bytes_per_s_per_peer: int = DEFAULT_RELAY_LIMITS.bytes_per_s_per_peer
    """Bytes per second for the relayed connections of any one peer. 0: no bound."""

    relay_circuit_s: float = DEFAULT_RELAY_LIMITS.circuit_s
    """How long a relayed connection between members may last. 0: no bound. Strangers get ten minutes."""

    relay_circuit_bytes: int = DEFAULT_RELAY_LIMITS.circuit_bytes
    """Bytes in each direction of a relayed connection between members. 0: no bound. Strangers get 16 MiB."""

    revoked: tuple[str, ...] = ()
    """Peer ids that are not let in whatever they show. On the node that founded the swarm this also ends
    the renewal of their membership."""

    connections_max: int = DEFAULT_LIMITS.connections
    """Connections at once, strangers' included."""

    dial_s: float = DEFAULT_LIMITS.dial_s
    """How long a TCP connect may take."""

    handshake_s: float = DEFAULT_LIMITS.handshake_s
    """How long from the first byte to a settled connection, membership apart."""

    keepalive_s: float = DEFAULT_LIMITS.keepalive_s
    """How often an idle connection is pinged. Each ping is about 60 bytes."""

    silence_s: float = DEFAULT_LIMITS.silence_s
    """How long after an unanswered ping a peer counts as gone. Shorter notices a dead stage sooner; too
    short takes a hiccup of the link for a death."""

    redial_s: float = 0.5
    """How soon a lost bootstrap peer is dialled again; doubles with each failure up to `redial_max_s`."""

    redial_max_s: float = 30.0
    """The longest wait between two dials of a peer that does not answer."""

    layers_wait_s: float = 5.0
    """How long a generation waits for somebody to hold layers that nobody holds, before it fails."""

    rescue_s: float = 1.0
    """How long layers of a model that this node serves must have been without any holder before it takes
    them beside its own, where `memory_bytes` allows and `assign` is on. Shorter than `layers_wait_s`, so that
    generations wait for it. 0: never."""

    leave_s: float = 3.0
    """How long a node that is stopped stays to let sessions move to others. Ctrl-C twice skips it."""

    log: str = "warning"
    """debug, info, warning or error: what goes to the node's standard error."""

    def validate(self) -> Config:
        """Raise `ConfigError` naming the first setting that cannot be used; returns itself."""
        _check(self.preset in PRESETS, "preset", self.preset, f"one of {', '.join(PRESETS)}")
        for name in ("listen", "announce", "relays", "bootstrap"):
            for addr in getattr(self, name):
                _check(_is_tcp(addr), name, addr, "a multiaddr such as /ip4/0.0.0.0/tcp/4800")
        for name in ("relays", "bootstrap"):
            for addr in getattr(self, name):
                _check("/p2p/" in addr, name, addr, "a multiaddr that ends in /p2p/PEER_ID")
        for name in self.foreign_protocols:
            _check(name in FOREIGN, "foreign_protocols", name, f"one of {', '.join(FOREIGN)}")
        host, port = split_host_port(self.api)
        if not is_loopback(host) and not self.api_token:
            raise ConfigError(
                f"api = {self.api!r} can be reached from other machines: set api_token as well "
                "(MYCEL_API_TOKEN, or api_token in config.toml), or bind it to 127.0.0.1"
            )
        _check(0 <= port < 65536, "api", self.api, "HOST:PORT with a port below 65536")
        for item in self.serve:
            parse_model_layers(item)
        for item in self.data:
            _check(re.fullmatch(r"[^=\s]+=.+", item) is not None, "data", item, "NAME=PATH")
        for name in _POSITIVE:
            _check(getattr(self, name) > 0, name, getattr(self, name), "more than 0")
        for name in _NOT_NEGATIVE:
            _check(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _check(self.redial_s <= self.redial_max_s, "redial_max_s", self.redial_max_s, "at least redial_s")
        _check(re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is not None, "device", self.device,
               "cpu, cuda, cuda:N or auto")  # fmt: skip
        for name, allowed in (
            ("dtype", DTYPES),
            ("log", LOG_LEVELS),
            ("relay", RELAY_CHOICES),
            ("probe", RELAY_CHOICES),
        ):
            _check(getattr(self, name) in allowed, name, getattr(self, name), f"one of {', '.join(allowed)}")
        return self

    def relay_limits(self) -> RelayLimits:
        """What this node gives as a relay."""
        return replace(
            DEFAULT_RELAY_LIMITS,
            reservations=self.relay_reservations_max,
            circuits=self.relay_circuits_max,
            circuits_per_peer=self.relay_circuits_per_peer,
            bytes_per_s=self.relay_bytes_per_s,
            bytes_per_s_per_peer=self.relay_bytes_per_s_per_peer,
            circuit_s=self.relay_circuit_s,
            circuit_bytes=self.relay_circuit_bytes,
        )

    def limits(self) -> Limits:
        """The connection core's bounds, with this config's deadlines in them."""
        return replace(
            DEFAULT_LIMITS,
            connections=self.connections_max,
            dial_s=self.dial_s,
            handshake_s=self.handshake_s,
            keepalive_s=self.keepalive_s,
            silence_s=self.silence_s,
        )


FOREIGN = ("/ipfs/kad/1.0.0",)
DTYPES = ("auto", "float32", "bfloat16", "float16")
RELAY_CHOICES = ("auto", "on", "off")
LOG_LEVELS = ("debug", "info", "warning", "error")
_NOT_NEGATIVE = ("memory_bytes", "threads", "stages", "blocks_bytes_max", "upload_bytes_per_s",
                 "lane_bytes_per_s", "leave_s", "layers_wait_s", "rescue_s", "relay_reservations_max",
                 "relay_circuits_max", "relay_circuits_per_peer", "relay_bytes_per_s",
                 "relay_bytes_per_s_per_peer", "relay_circuit_s", "relay_circuit_bytes")  # fmt: skip
_POSITIVE = ("kv_bytes_max", "connections_max", "dial_s", "handshake_s", "keepalive_s", "silence_s",
             "redial_s", "redial_max_s")  # fmt: skip

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "local": {
        "listen": ("/ip4/127.0.0.1/tcp/0",),
        "mdns": False,
        "port_mapping": False,
        "dial_s": 2.0,
        "keepalive_s": 0.25,
        "silence_s": 1.5,
        "redial_s": 0.1,
        "redial_max_s": 2.0,
        "layers_wait_s": 3.0,
        "rescue_s": 0.5,
    },
    "lan": {},
    "wan": {
        "dial_s": 10.0,
        "handshake_s": 10.0,
        "keepalive_s": 2.0,
        "silence_s": 6.0,
        "redial_s": 2.0,
        "redial_max_s": 120.0,
        "layers_wait_s": 20.0,
        "rescue_s": 5.0,
        "leave_s": 10.0,
    },
}


def parse_model_layers(text: str) -> tuple[str, tuple[int, int] | None]:
    """`MODEL` or `MODEL@i:j` into (model, (i, j) or None). Raises `ConfigError`."""
    model, at, layers = text.rpartition("@")
    if not at:
        return text, None
    return model, parse_layers(layers)


def parse_layers(text: str) -> tuple[int, int]:
    """`i:j` into (i, j) with i < j. Raises `ConfigError`."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise ConfigError(f"layers {text!r} are not i:j with i below j, as in 0:8 (layers 0 to 7)")
    return int(match[1]), int(match[2])


def split_host_port(text: str) -> tuple[str, int]:
    """HOST:PORT (brackets around an IPv6 host) into its parts. Raises `ConfigError`."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal():
        raise ConfigError(f"{text!r} is not HOST:PORT, as in 127.0.0.1:4810")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    return host in ("localhost", "::1") or host.startswith("127.")


def _is_tcp(addr: str) -> bool:
    try:
        names = [protocol.name for protocol in Multiaddr(addr).protocols()]
    except (ValueError, LookupError):
        return False
    return len(names) >= 2 and names[0] in ("ip4", "ip6", "dns", "dns4", "dns6") and names[1] == "tcp"


def _check(good: bool, name: str, value: object, wanted: str) -> None:
    if not good:
        raise ConfigError(f"{name} = {value!r}: it must be {wanted}")
