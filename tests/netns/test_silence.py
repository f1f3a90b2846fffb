"""Zero packets to anybody who was not named: a daemon behind a firewall that counts every other destination.

Named are the ticket's addresses, addresses that members sign, the multicast groups of the home's own network,
and its gateway. Everything else that leaves the machine, be it for a name server, a time server, a tracker of
versions, or a hub of models, is counted by the kernel and told apart by address.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from netlab.daemon import Daemon, until
from netlab.lab import HOME_NET, Lab, Site, kind
from netlab.space import Space

WATCH_S = 12.0
"""How long the daemons run once they are all connected."""
SETTLED_S = 60.0
LISTEN = ("--listen", "/ip4/0.0.0.0/tcp/4001")
MULTICAST = ("224.0.0.251", "239.255.255.250", "224.0.0.22", "224.0.0.1")
"""mDNS, SSDP (how UPnP finds a router), and the kernel's own IGMP."""
HOUSE = (f"{HOME_NET}.1", *MULTICAST)
"""The gateway and the groups: what a daemon may ask in its own house."""

pytestmark = pytest.mark.slow


def count_others(space: Space, named: list[str]) -> None:
    """Count what leaves `space` for anywhere but `named`."""
    space.command("nft", "-f", "-", text=f"""
        table inet watch {{
          counter others {{}}
          counter house {{}}
          set strays {{ type ipv4_addr . inet_proto; size 4096; flags dynamic; }}
          set named {{ type ipv4_addr; elements = {{ {", ".join(named)} }} }}
          chain out {{
            type filter hook output priority filter;
            oifname lo accept
            ip daddr {{ {", ".join(HOUSE)} }} counter name house accept
            ip daddr @named accept
            update @strays {{ ip daddr . meta l4proto }}
            counter name others
          }}
        }}
    """)  # fmt: skip


def packets(space: Space, counter: str) -> int:
    """What the firewall of `space` has counted: for `others`, or for the `house`."""
    items = json.loads(space.command("nft", "-j", "list", "counter", "inet", "watch", counter))["nftables"]
    return int(next(item["counter"]["packets"] for item in items if "counter" in item))


def others(space: Space) -> tuple[int, list[str]]:
    """(packets to others, to whom)."""
    count = packets(space, "others")
    items = json.loads(space.command("nft", "-j", "list", "set", "inet", "watch", "strays"))["nftables"]
    strays = next(item["set"] for item in items if item.get("set", {}).get("name") == "strays")
    return count, ["/".join(map(str, one["concat"])) for one in strays.get("elem", [])]


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


def test_no_packet_goes_to_anybody_who_was_not_named(lab: Lab, tmp_path: Path) -> None:
    sites: dict[str, Site] = {
        "hub": lab.public("hub"),
        "second": lab.public("second"),
        "full": lab.site("full", kind("full cone")),
        "port": lab.site("port", kind("port")),
    }
    stranger = lab.public("stranger")
    lab.open()
    members = [site.outer for site in sites.values()]
    for site in sites.values():
        count_others(site.home, members)
    daemons = {name: Daemon(site.home, tmp_path / name) for name, site in sites.items()}
    try:
        daemons["hub"].start("up", *LISTEN)
        ticket = daemons["hub"].run("ticket").strip()
        for name in ("second", "full", "port"):
            daemons[name].start("join", ticket, *LISTEN)
        wanted = {name: {other: "direct" for other in daemons if other != name} for name in daemons}
        until(
            "all are connected directly",
            SETTLED_S,
            lambda: {name: daemon.paths() for name, daemon in daemons.items()} == wanted,
        )
        time.sleep(WATCH_S)
        # They did look around in their houses, so this was no silence of somebody who sleeps.
        assert all(packets(sites[name].home, "house") > 0 for name in ("full", "port"))
        assert {name: others(site.home) for name, site in sites.items()} == dict.fromkeys(sites, (0, []))
        assert {addr for addr in lab.unknown() if addr.split("/")[0] not in MULTICAST} == set()
        assert [daemon.stop() for daemon in daemons.values()] == [0] * len(daemons)
        assert {name: others(site.home) for name, site in sites.items()} == dict.fromkeys(sites, (0, []))
    finally:
        for daemon in daemons.values():
            daemon.stop()
    # The firewall does count: one stray datagram, and it is named.
    stray = sites["port"].home
    stray.command("bash", "-c", f"echo x > /dev/udp/{stranger.addr}/53")
    count, whom = others(stray)
    assert (count, whom) == (1, [f"{stranger.addr}/udp"])
