"""The demo, `make demo`: a model trained by daemons together, then spread over them, while some are killed.

    1  start three daemons: one founds a swarm, two join by ticket
    2  hand in a job: train a small byte-level Llama on Python's standard library, by DiLoCo; one daemon is
       killed meanwhile, and a fourth one joins (kept for the next time)
    3  run the result unsplit, here, for comparison
    4  serve it, split: the layers find their peers by themselves
    5  stream a completion through the OpenAI API
    6  again, and SIGKILL a middle stage in mid-sentence
    7  compare, and say what happened

It ends with an error when anything it prints is not so.
"""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import openmp  # noqa: F401 before torch
import show
import torch
from nodes import READY_S, Daemon, DemoFailed, Swarm
from runs import Ask, Run, run_swarm, run_unsplit
from train import Point, Training, command, finish_model, follow, fresh_model, write_job

CACHE = Path(__file__).resolve().parents[2] / ".cache"
STAGES = 3
SEEDS = 8
STALL_S_MAX = 3.0
LOSS_SHARE_MAX = 0.6
"""Of the first border's loss, what the last one's may be."""
DONE = "done"
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
    training = Training()
    folder = CACHE / f"demo-model-{training.key()}"
    show.title("Three daemons, one swarm")
    options = ["--preset", "local", "--stages", str(STAGES), "--threads", "1", "--models", str(CACHE)]
    with Swarm(options) as swarm:
        _found(swarm)
        if not (folder / DONE).exists():
            _train(swarm, training, folder)
        else:
            show.title("A small model to split")
            show.say(f"kept from an earlier run, {(folder / DONE).read_text('utf-8').strip()}")
        torch.set_num_threads(1)  # so small a model is quickest on one
        ask, unsplit = _choose_sentence(folder)

        show.title("Four daemons serve it, split")
        _complete(swarm)
        first = _serve(swarm, folder)
        _show_swarm(swarm, first)
        calm, stormy, report = _generate_twice(swarm, first, folder.name, ask)
        _judge(swarm, unsplit, calm, stormy, report)


def _found(swarm: Swarm) -> None:
    first = swarm.start("anna", "up")
    swarm.await_up(first)
    ticket = _ticket(swarm)
    show.say(f"anna founded a swarm; its ticket: {ticket[:24]}…{ticket[-6:]} ({len(ticket)} characters)")
    for name in ("bert", "cleo"):
        swarm.start(name, "join", ticket)
    for daemon in swarm.daemons[1:]:
        swarm.await_up(daemon)


def _ticket(swarm: Swarm) -> str:
    return str(swarm.daemons[0].control.post("ticket", {"label": "demo"})["text"])


def _complete(swarm: Swarm) -> None:
    """Start those of the four that do not run."""
    running = {daemon.name for daemon in swarm.daemons if daemon.process.poll() is None}
    for name in ("bert", "dora"):
        if name not in running:
            swarm.start(name, "join", _ticket(swarm))
    for daemon in swarm.daemons:
        swarm.await_up(daemon)


def _train(swarm: Swarm, training: Training, folder: Path) -> None:
    """The swarm trains a model into `folder`. Raises `DemoFailed`."""
    show.title("They train a small model together")
    began = time.monotonic()
    CACHE.mkdir(exist_ok=True)
    points: list[Point] = []
    marks: dict[int, str] = {}
    with tempfile.TemporaryDirectory(prefix="mycel-demo-job-", dir=CACHE) as work:
        fresh = Path(work) / "fresh"
        fresh_model(training, fresh)
        path = write_job(training, fresh, Path(work), peers=2)
        job = command(swarm, "submit", str(path))["id"]
        show.say(f"anna hands in job {job[:8]}: {training.steps} steps each, borders every {training.every}")

        def on_point(point: Point) -> None:
            points.append(point)
            show.border(point, training.borders)
            if not marks and point.step >= training.borders * 3 // 10 and point.peers == 3:
                victim = next(daemon for daemon in swarm.daemons if daemon.name == "bert")
                victim.kill()
                marks[point.step] = "bert is killed"
                swarm.start("dora", "join", _ticket(swarm))
            elif len(marks) == 1 and point.peers == 3 and points[-2].peers == 2:
                marks[point.step] = "dora has joined"

        follow(swarm, job, on_point)
        command(swarm, "pull", job, str(Path(work) / "results"))
        shutil.rmtree(folder, ignore_errors=True)
        finish_model(fresh, Path(work) / "results", folder)
    picture = folder / "loss.png"
    show.curve(points, marks, picture)
    show.say(f"{picture.relative_to(CACHE.parent)}")
    first, last = points[0].loss, points[-1].loss
    for what, good, how in (
        ("the loss fell", last < LOSS_SHARE_MAX * first, f"from {first:.2f} to {last:.2f} nats a byte"),
        ("one died and one joined meanwhile", len(marks) == 2, ", ".join(marks.values()) or "nobody did"),
        ("every border was passed", points[-1].step == training.borders, f"{training.borders} of them"),
    ):
        show.check(what, good, how)
        if not good:
            raise DemoFailed(f"not so: {what}")
    (folder / DONE).write_text(f"loss {last:.3f}\n", "utf-8")
    show.say(f"trained in {time.monotonic() - began:.0f} s")


def _choose_sentence(folder: Path) -> tuple[Ask, Run]:
    """Of some seeds' sentences the one with the most lines: so small a model likes to go on with blanks."""
    runs = [(ask, run_unsplit(folder, ask)) for ask in (Ask(seed=seed) for seed in range(SEEDS))]
    return max(runs, key=lambda pair: _richness(pair[1].text))


def _richness(text: str) -> tuple[int, int]:
    return sum(bool(line.strip()) for line in text.splitlines()), len("".join(text.split()))


def _serve(swarm: Swarm, folder: Path) -> Daemon:
    first = swarm.daemons[0]
    command(swarm, "serve", str(folder))

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
