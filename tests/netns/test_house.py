"""What a node does with the house it is in: finding machines of the swarm, asking the router for a port.

The multicast is real, and so is the router: miniupnpd on the box.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from netlab.daemon import Daemon, until
from netlab.lab import Lab, Site, kind

SETTLED_S = 40.0
MINIUPNPD = Path("/usr/sbin/miniupnpd")

pytestmark = pytest.mark.slow


def listen(port: int) -> tuple[str, str]:
    """The options that name a port."""
    return "--listen", f"/ip4/0.0.0.0/tcp/{port}"


@pytest.fixture
def house(tmp_path: Path) -> Iterator[list[Daemon]]:
    """Three machines in one home."""
    with Lab() as lab:
        site = lab.site("house", kind("port"), homes=3)
        lab.open()
        daemons = [Daemon(home, tmp_path / f"d{place}") for place, home in enumerate(site.homes)]
        try:
            yield daemons
        finally:
            for daemon in daemons:
                daemon.stop()


def test_members_in_one_house_find_each_other_without_an_address(house: list[Daemon]) -> None:
    founder, member, deaf = house
    founder.start("up", *listen(4001))
    ticket = founder.run("ticket").strip()
    founder.stop()
    founder.start("up", *listen(4002))  # nobody is where the ticket says any more
    member.start("join", ticket, *listen(4001))
    deaf.start("join", ticket, *listen(4001), "--no-mdns")
    until(
        "the founder and the member are connected", SETTLED_S, lambda: founder.paths().get("d1") == "direct"
    )
    assert "d2" not in founder.paths()


@pytest.fixture(params=["upnp", "pmp"])
def routed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Site, Daemon, list[Daemon]]]:
    """A home whose router forwards ports, its daemon, and two public daemons."""
    if not MINIUPNPD.exists():
        pytest.skip("miniupnpd is not installed (Debian: apt-get install miniupnpd-nftables)")
    with Lab() as lab:
        site = lab.site("home", kind("port"))
        public = [Daemon(lab.public(name).home, tmp_path / name) for name in ("hub", "second")]
        home = Daemon(site.home, tmp_path / "home")
        lab.open()
        router = start_router(site, tmp_path, request.param)
        try:
            yield site, home, public
        finally:
            for daemon in (home, *public):
                daemon.stop()
            router.kill()
            router.communicate()


ROUTER_RULES = """
insert rule ip box self iifname lan accept
table inet filter {
  chain forward { type filter hook forward priority 0; policy accept; jump miniupnpd; }
  chain miniupnpd { }
  chain prerouting { type nat hook prerouting priority -101; policy accept; jump prerouting_miniupnpd; }
  chain prerouting_miniupnpd { }
  chain postrouting { type nat hook postrouting priority 99; policy accept; jump postrouting_miniupnpd; }
  chain postrouting_miniupnpd { }
}
"""


def start_router(site: Site, folder: Path, speaks: str) -> subprocess.Popen[str]:
    """miniupnpd on the site's box, speaking one of its two protocols."""
    box = site.boxes[0]
    box.command("nft", "-f", "-", text=ROUTER_RULES)
    config = folder / "router.conf"
    config.write_text(
        "ext_ifname=wan\nlistening_ip=lan\nuuid=00000000-0000-0000-0000-000000000001\nsecure_mode=yes\n"
        f"enable_upnp={'yes' if speaks == 'upnp' else 'no'}\n"
        f"enable_natpmp={'yes' if speaks == 'pmp' else 'no'}\n"
        f"ext_ip={site.outer}\nlease_file={folder / 'leases'}\n"
        "allow 1024-65535 192.168.1.0/24 1024-65535\ndeny 0-65535 0.0.0.0/0 0-65535\n"
    )
    with open(folder / "router.log", "w", encoding="utf-8") as log:
        return box.start([str(MINIUPNPD), "-d", "-f", str(config)], stdout=log, stderr=log)


def forwards(site: Site) -> str:
    """What the router forwards now."""
    return site.boxes[0].command("nft", "list", "chain", "inet", "filter", "prerouting_miniupnpd")


def test_a_port_is_forwarded_told_and_given_back(routed: tuple[Site, Daemon, list[Daemon]]) -> None:
    site, home, (hub, second) = routed
    hub.start("up", *listen(4001))
    ticket = hub.run("ticket").strip()
    second.start("join", ticket, *listen(4001))
    home.start("join", ticket, *listen(4001))
    until("the router forwards the port", SETTLED_S, lambda: "dport 4001" in forwards(site))
    until(
        "others were told of it, once somebody had called there",
        SETTLED_S,
        lambda: any(f"/ip4/{site.outer}/tcp/4001" in addr for addr in home.json("status")["listen"]),
    )
    assert home.stop() == 0
    assert "dport 4001" not in forwards(site)
