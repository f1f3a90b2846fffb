"""The demo, `make demo`: a model spread over daemons, one of which is killed in mid-sentence.

    1  train a small byte-level Llama on Python's standard library (kept for the next time)
    2  run it unsplit, here, for comparison
    3  start four daemons: one founds a swarm, three join by ticket; the layers find their peers by themselves
    4  stream a completion through the OpenAI API
    5  again, and SIGKILL a middle stage in mid-sentence
    6  compare, and say what happened

It ends with an error when anything it prints is not so.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Any

import openmp  # noqa: F401 before torch
import show
import torch
from nodes import READY_S, Daemon, DemoFailed, Swarm
from runs import Ask, Run, run_swarm, run_unsplit
from train import Training, trained_model

CACHE = Path(__file__).resolve().parents[2] / ".cache"
STAGES = 3
SEEDS = 8
STALL_S_MAX = 3.0
LOGPROB_ERROR_MAX = 1e-3
"""Between split and unsplit: other kernels may round the last bits of float32 differently."""


def main() -> int:
    """Run the demo; the process's exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    began = time.monotonic()
    try:
        _demo()
    except (DemoFailed, RuntimeError) as failure:
        show.fail(str(failure))
        return 1
    except KeyboardInterrupt:
        return 130
    show.say(f"all of it in {time.monotonic() - began:.0f} s")
    return 0


def _demo() -> None:
    show.title("A small model to split")
    with show.training() as progress:
        folder, seconds = trained_model(Training(), CACHE, progress)
    done = (folder / "done").read_text("utf-8").strip()
    show.say(f"trained in {seconds:.0f} s, {done}" if seconds else f"kept from an earlier run, {done}")
    show.say(str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder))
    torch.set_num_threads(1)  # so small a model is quickest on one
    ask, unsplit = _choose_sentence(folder)

    show.title("Four daemons, one swarm")
    options = ["--preset", "local", "--stages", str(STAGES), "--threads", "1", "--models", str(folder.parent)]
    with Swarm(options) as swarm:
        first = _start(swarm, folder)
        _show_swarm(swarm, first)
        calm, stormy, report = _generate_twice(swarm, first, folder.name, ask)
        _judge(swarm, unsplit, calm, stormy, report)


def _choose_sentence(folder: Path) -> tuple[Ask, Run]:
    """Of some seeds' sentences the one with the most lines: so small a model likes to go on with blanks."""
    runs = [(ask, run_unsplit(folder, ask)) for ask in (Ask(seed=seed) for seed in range(SEEDS))]
    return max(runs, key=lambda pair: _richness(pair[1].text))


def _richness(text: str) -> tuple[int, int]:
    return sum(bool(line.strip()) for line in text.splitlines()), len("".join(text.split()))


def _start(swarm: Swarm, folder: Path) -> Daemon:
    first = swarm.start("anna", "up", "--serve", str(folder))
    swarm.await_up(first)
    ticket = first.control.post("ticket", {"label": "demo"})["text"]
    show.say(f"anna founded a swarm; its ticket: {ticket[:24]}…{ticket[-6:]} ({len(ticket)} characters)")
    for name in ("bert", "cleo", "dora"):
        swarm.start(name, "join", ticket)
    for daemon in swarm.daemons[1:]:
        swarm.await_up(daemon)

    def is_ready() -> bool:
        models = first.control.get("models")
        holders = models[0]["holders"] if models else []
        return len(holders) == len(swarm.daemons) and all(one["state"] == "ready" for one in holders)

    with show.waiting("workers import torch and load their layers"):
        swarm.await_true(READY_S, "the layers did not find their peers", is_ready)
    return first


def _show_swarm(swarm: Swarm, first: Daemon) -> None:
    holders = {one["peer"]: one for one in first.control.get("models")[0]["holders"]}
    rows = []
    for daemon in swarm.daemons:
        layers = f"{holders[daemon.peer]['start']}:{holders[daemon.peer]['end']}"
        connected = str(daemon.control.get("status")["peers"])
        rows.append((daemon.name, f"…{daemon.peer[-8:]}", layers, connected))
    show.table(("daemon", "peer id", "layers", "connected to"), rows)


def _generate_twice(swarm: Swarm, first: Daemon, model: str, ask: Ask) -> tuple[Run, Run, dict[str, Any]]:
    show.title("A completion through the OpenAI API")
    with show.streaming(ask.prompt) as page:
        calm = run_swarm(first.api, model, ask, lambda text, count: page.add(text))
    route = _report(first, calm)["route"]
    show.say(f"{len(calm.tokens)} tokens at {calm.tokens_per_s:.0f} tokens/s over {_route(swarm, route)}")
    if len(route) != STAGES:
        raise DemoFailed(f"the route has {len(route)} stages, not {STAGES}")

    show.title("The same again, and a stage dies")
    victim = swarm.by_peer(route[1]["peer"])
    kill_at = ask.tokens * 2 // 5
    with show.streaming(ask.prompt) as page:

        def on_text(text: str, count: int) -> None:
            if count >= kill_at and victim.process.poll() is None and not page.is_marked:
                victim.kill()
                page.mark(f" ☠ SIGKILL {victim.name} ")
            page.add(text)

        stormy = run_swarm(first.api, model, ask, on_text)
    return calm, stormy, _report(first, stormy)


def _report(first: Daemon, run: Run) -> dict[str, Any]:
    reports = [one for one in first.control.get("reports") if one["session"] == run.session]
    if not reports:
        raise DemoFailed(f"the node has no report of session {run.session}")
    return dict(reports[-1])


def _route(swarm: Swarm, stages: list[dict[str, Any]]) -> str:
    names = [f"{swarm.by_peer(one['peer']).name} {one['span'][0]}:{one['span'][1]}" for one in stages]
    return " → ".join(names)


def _by_name(swarm: Swarm, text: str) -> str:
    for daemon in swarm.daemons:
        text = text.replace(daemon.peer, daemon.name)
    return text


def _judge(swarm: Swarm, unsplit: Run, calm: Run, stormy: Run, report: dict[str, Any]) -> None:
    """Print what happened; every line is checked. Raises `DemoFailed`."""
    show.title("What happened")
    failovers = report["failovers"]
    lost = [swarm.by_peer(peer).name for failover in failovers for peer in failover["lost"]]
    stall = max((failover["stall_s"] for failover in failovers), default=0.0)
    off = max((abs(a - b) for a, b in zip(unsplit.logprobs, calm.logprobs, strict=False)), default=1.0)
    checks = [
        ("the sentence was finished", stormy.finish == unsplit.finish == calm.finish,
         f"{len(stormy.tokens)} tokens, finish reason {stormy.finish}"),
        ("a middle stage was lost on the way", len(lost) == 1, f"{', '.join(lost) or 'none'} was lost"),
        ("same tokens as the undisturbed run", (stormy.tokens, stormy.text) == (calm.tokens, calm.text),
         f"{len(calm.tokens)} of {len(calm.tokens)}"),
        ("same probabilities, to the last bit", stormy.logprobs == calm.logprobs,
         "replayed in the same steps"),
        ("same tokens as the unsplit model", (calm.tokens, calm.text) == (unsplit.tokens, unsplit.text),
         f"transformers, in one piece; log-probabilities within {off:.0e}"),
        (f"the stall stayed under {STALL_S_MAX:g} s", 0 < stall < STALL_S_MAX,
         f"{stall * 1000:.0f} ms; the client waited {stormy.longest_gap_s * 1000:.0f} ms at most"),
    ]  # fmt: skip
    checks.append(("probabilities like the unsplit model's", off < LOGPROB_ERROR_MAX, f"{off:.1e}"))
    for what, good, how in checks:
        show.check(what, good, how)
    for failover in failovers:
        show.say(f"at token {failover['position']}: {_by_name(swarm, failover['why'])}")
        show.say(f"went on over {_route(swarm, failover['route'])}, {failover['replay']} replay, "
                 f"{failover['replayed_rows']} rows computed again by the spare")  # fmt: skip
    show.say(f"undisturbed {calm.tokens_per_s:.0f} tokens/s, disturbed {stormy.tokens_per_s:.0f} tokens/s, "
             f"unsplit in this process {unsplit.tokens_per_s:.0f} tokens/s")  # fmt: skip
    wrong = [what for what, good, _ in checks if not good]
    if wrong:
        raise DemoFailed("not so: " + "; ".join(wrong))


if __name__ == "__main__":
    sys.exit(main())
