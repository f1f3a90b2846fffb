"""Twenty deaths in mid-sentence: real daemons, real workers, real sockets.

Three daemons share a tiny random model, a fourth is the spare; the sessions' owner is a node in this process
that holds no layers. For each seed a prompt is continued greedily twice: undisturbed, and with the daemon of
one stage struck at a random token. Even seeds kill it (SIGKILL: its kernel resets its connections), odd ones
stop it (SIGSTOP: silence). The first, the middle and the last stage take turns. Afterwards who was killed is
started again, and who was stopped wakes up, so the same swarm lives through all of it.

Of each seed it must be true that

- the tokens and the text are those of the undisturbed run, and of transformers' `generate()`;
- just the struck peer was replaced, once, in the original steps, and the stall was short: under 1 s after a
  reset, under 3 s after silence;
- the stages that live on computed every row once, so nothing during the replay (their own counters say so);
- the workers of a killed daemon died with it.

The last line is one JSON object; the exit status is 0 only if all seeds were good. Stalls are wall time: what
else runs on the machine counts (`load_per_core`), and where it starves a daemon, that daemon is replaced too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import measure
import psutil
import trio
from daemons import Machine, NotSo, owner, ready, until

from mycel.compute.engine import Sampling
from mycel.compute.infer.request import GenerateRequest, Report, Token
from mycel.node.running import Node
from mycel.node.views import TicketAsk
from mycel.protocol.errors import MycelError

SEEDS = 20
TOKENS = 200
LAST_STRIKE = TOKENS - 72
"""Later, the ring may be through before anybody misses the dead: it may be 64 tokens ahead of the client."""
STALL_S_MAX = {"reset": 1.0, "silence": 3.0}
ROLES = ("first", "middle", "last")
READY_S = 200.0
GENERATE_S = 60.0
ORPHAN_S = 5.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What one seed does."""

    seed: int

    @property
    def kind(self) -> str:
        """How the stage dies: "reset" or "silence"."""
        return "silence" if self.seed % 2 else "reset"

    @property
    def role(self) -> int:
        """Which stage of the route."""
        return self.seed // 2 % len(ROLES)

    @property
    def at(self) -> int:
        """How many tokens are there when it dies."""
        return random.Random(f"soak at {self.seed}").randrange(LAST_STRIKE)

    @property
    def prompt(self) -> tuple[int, ...]:
        """Printable bytes."""
        rng = random.Random(f"soak prompt {self.seed}")
        return tuple(rng.randrange(32, 127) for _ in range(rng.randrange(4, 48)))


@dataclass(slots=True)
class Run:
    """One generation."""

    tokens: list[Token] = field(default_factory=list)
    text: str = ""
    rows: dict[str, int] = field(default_factory=dict)
    """Rows that each machine computed for it."""
    report: Report | None = None

    @property
    def ids(self) -> list[int]:
        """The tokens' ids."""
        return [token.id for token in self.tokens]


@dataclass(slots=True)
class Finding:
    """What came of one seed."""

    plan: Plan
    wrong: list[str] = field(default_factory=list)
    stall_s: float = 0.0
    gap: float | None = None
    """Where the tokens differ: between the two best log-probabilities there."""
    same_as_calm: bool = False
    same_as_generate: bool = False
    survivors_idle: bool = False


class Soak:
    """The swarm under test, and what is done to it."""

    def __init__(self, node: Node, machines: list[Machine], model: Path) -> None:
        self._node = node
        self._machines = machines
        self._model = model

    async def settle(self) -> None:
        """Wait until everybody is connected with everybody and all stages are ready."""
        for machine in self._machines:
            await until(f"{machine.name} is up", READY_S, partial(machine.is_up, len(self._machines)))
        await until("all stages are ready", READY_S, lambda: len(ready(self._node)) == len(self._machines))

    async def run(self, plan: Plan, victim: Machine | None) -> Run:
        """One generation; `victim` is struck at its token."""
        request = GenerateRequest(
            model=self._model.name,
            prompt=plan.prompt,
            max_tokens=TOKENS,
            stop_tokens=(),
            sampling=Sampling(logprobs=2),
        )
        before = await self._count(self._machines)
        run = Run()
        with trio.fail_after(GENERATE_S):
            async with self._node.generator.generate(request) as generation:
                while True:
                    if victim is not None and len(run.tokens) >= plan.at:
                        victim.signal(signal.SIGKILL if plan.kind == "reset" else signal.SIGSTOP)
                        struck, victim = victim, None
                        before.pop(struck.name)
                    piece = await anext(generation, None)
                    if piece is None:
                        break
                    run.tokens += piece.tokens
                    run.text += piece.text
                run.report = generation.report
        after = await self._count([machine for machine in self._machines if machine.name in before])
        run.rows = {name: after[name] - before[name] for name in before}
        return run

    async def _count(self, machines: list[Machine]) -> dict[str, int]:
        return {
            machine.name: await trio.to_thread.run_sync(machine.counter, "rows_computed")
            for machine in machines
        }

    async def one(self, plan: Plan, expected: list[int]) -> Finding:
        """One seed: undisturbed, struck, and made whole again."""
        await self.settle()
        finding = Finding(plan)
        calm = await self.run(plan, None)
        assert calm.report is not None
        victim = self._by_peer(calm.report.route[plan.role].peer)
        workers = victim.workers()
        try:
            _judge(finding, calm, await self.run(plan, victim), expected, victim)
        except (MycelError, trio.TooSlowError) as error:
            finding.wrong.append(f"{type(error).__name__}: {error}")
        if plan.kind == "reset":
            victim.wait()
            _, alive = await trio.to_thread.run_sync(partial(psutil.wait_procs, workers, timeout=ORPHAN_S))
            _check(finding, not alive, f"{len(alive)} workers outlived their daemon")
            victim.start()
        else:
            victim.signal(signal.SIGCONT)
        return finding

    def _by_peer(self, peer: str) -> Machine:
        return next(machine for machine in self._machines if machine.peer == peer)


def _judge(finding: Finding, calm: Run, stormy: Run, expected: list[int], victim: Machine) -> None:
    """Say of a seed what is not as it should be."""
    plan, report = finding.plan, stormy.report
    assert report is not None
    finding.same_as_calm = (stormy.ids, stormy.text) == (calm.ids, calm.text)
    finding.same_as_generate = stormy.ids == expected
    _check(finding, calm.ids == expected, "the undisturbed run says something else than generate()")
    _check(finding, finding.same_as_calm, "the text is not that of the undisturbed run")
    _check(finding, finding.same_as_generate, "the tokens are not those of generate()")
    for other in (calm.ids, expected):
        differ = [i for i, (a, b) in enumerate(zip(stormy.ids, other, strict=False)) if a != b]
        if differ and finding.gap is None:
            best, second = stormy.tokens[differ[0]].top[:2]
            finding.gap = best[2] - second[2]
    rows = len(plan.prompt) + TOKENS - 1
    wrong = {name: count for name, count in stormy.rows.items() if count != rows}
    finding.survivors_idle = not wrong
    _check(finding, not wrong, f"of {rows} rows these computed another number: {wrong}")
    failovers = report.failovers
    lost = [peer for failover in failovers for peer in failover.lost]
    _check(finding, lost == [victim.peer], f"replaced were {lost}, in {len(failovers)} failovers")
    _check(finding, all(one.replay == "exact" for one in failovers), "the replay was in larger steps")
    finding.stall_s = max((one.stall_s for one in failovers), default=0.0)
    finding.stall_s = max(finding.stall_s, report.longest_gap_s)
    limit = STALL_S_MAX[plan.kind]
    _check(finding, 0 < finding.stall_s < limit, f"it stalled {finding.stall_s:.2f} s, not under {limit:g} s")
    if finding.wrong:
        finding.wrong += [f"at {one.position}: {one.why}" for one in failovers]


def _check(finding: Finding, good: bool, wrong: str) -> None:
    if not good:
        finding.wrong.append(wrong)


# --- all of it


async def soak(folder: Path, asked: argparse.Namespace, findings: list[Finding]) -> None:
    """All seeds, in one swarm, into `findings`. Raises `NotSo` when the swarm does not get whole again."""
    model: Path = asked.model or folder / "tiny"
    plans = [Plan(seed) for seed in range(asked.first, asked.first + asked.seeds)]
    print(f"generate() of the unsplit model, {len(plans)} prompts", flush=True)
    expected = await _expected(model, plans, make=asked.model is None)
    async with owner(folder / "owner") as node:
        machines = _machines(folder, node, model)
        swarm = Soak(node, machines, model)
        try:
            print("starting four daemons; their workers import torch and load their layers", flush=True)
            await _start(swarm, node, machines)
            for plan, tokens in zip(plans, expected, strict=True):
                findings.append(await swarm.one(plan, tokens))
                print(_line(findings[-1]), flush=True)
            await swarm.settle()
        except NotSo:
            for machine in machines:
                print(f"--- {machine.name}\n{machine.last_words()}", flush=True)
            raise
        finally:
            for machine in machines:
                machine.stop()
            for machine in machines:
                machine.wait()


def _machines(folder: Path, node: Node, model: Path) -> list[Machine]:
    ticket = node.issue_ticket(TicketAsk()).text
    layers = int(json.loads((model / "config.json").read_text())["num_hidden_layers"])
    edge = max(1, layers // 4)
    common = ["join", ticket, "--preset", "local", "--threads", "1", "--dtype", "float32", "--device", "cpu"]
    machines = []
    for name, (i, j) in zip(ROLES, pairwise((0, edge, layers - edge, layers)), strict=True):
        machines.append(Machine(folder / name, [*common, "--no-assign", "--serve", f"{model}@{i}:{j}"]))
    return [*machines, Machine(folder / "spare", [*common, "--assign", "--models", str(model.parent)])]


async def _start(swarm: Soak, node: Node, machines: list[Machine]) -> None:
    """The stages first, so that the spare finds all layers held and takes all of them."""
    for machine in machines[:-1]:
        machine.start()
    await until("the stages are ready", READY_S, lambda: len(ready(node)) == len(ROLES))
    machines[-1].start()
    await swarm.settle()


async def _expected(model: Path, plans: list[Plan], *, make: bool) -> list[list[int]]:
    """What `generate()` says, of another process: this one stays free of torch."""
    asks = json.dumps({"model": str(model), "make": make, "prompts": [plan.prompt for plan in plans]})
    done = await trio.run_process(
        [sys.executable, __file__, "--unsplit"], stdin=asks.encode(), capture_stdout=True
    )
    return [list(map(int, tokens)) for tokens in json.loads(done.stdout)]


def _unsplit() -> None:
    """In the child: greedy tokens of each prompt."""
    import torch
    from transformers import AutoModelForCausalLM

    from mycel.compute.model.tiny import tiny_model
    from mycel.compute.tokenizer import byte_level_tokenizer_files

    asks = json.load(sys.stdin)
    if asks["make"]:
        folder = tiny_model(Path(asks["model"]), seed=5, vocab_size=257, max_position_embeddings=512)
        for name, content in byte_level_tokenizer_files().items():
            (folder / name).write_bytes(content)
    torch.set_num_threads(1)
    whole = AutoModelForCausalLM.from_pretrained(asks["model"], dtype=torch.float32).eval()
    found = []
    for prompt in asks["prompts"]:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = whole.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False,
                eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        found.append(out[0, len(prompt) :].tolist())
    json.dump(found, sys.stdout)


def _line(finding: Finding) -> str:
    plan = finding.plan
    what = f"seed {plan.seed:2}  {plan.kind:7}  {ROLES[plan.role]:6}  at token {plan.at:3}"
    said = "; ".join(finding.wrong) if finding.wrong else "same text, nothing computed twice"
    return f"{what}  stall {finding.stall_s:5.2f} s  {'NOT SO' if finding.wrong else 'ok'}: {said}"


def _report(findings: list[Finding], asked: int) -> bool:
    """Print the last line; whether all is well."""
    good = sum(not finding.wrong for finding in findings)
    gaps = [finding.gap for finding in findings if finding.gap is not None]
    figures: dict[str, float | int | None] = {
        "seeds": asked,
        "ok": good,
        "same_as_undisturbed": sum(finding.same_as_calm for finding in findings),
        "same_as_generate": sum(finding.same_as_generate for finding in findings),
        "survivors_idle": sum(finding.survivors_idle for finding in findings),
    }
    for kind in STALL_S_MAX:
        stalls = [finding.stall_s for finding in findings if finding.plan.kind == kind]
        figures[f"stall_{kind}_s_median"] = statistics.median(stalls) if stalls else None
        figures[f"stall_{kind}_s_max"] = max(stalls, default=None)
    figures["load_per_core"] = os.getloadavg()[0] / len(os.sched_getaffinity(0))
    figures["mismatches"] = len(gaps)
    figures["mismatch_gap_max"] = max(gaps, default=None)
    measure.report("soak", figures)
    return good == asked


def main() -> int:
    """Run it; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--first", type=int, default=0, help="the first seed (default 0)")
    parser.add_argument("--model", type=Path, help="a folder with a byte-level model (default: a random one)")
    parser.add_argument("--unsplit", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.unsplit:
        _unsplit()
        return 0
    with tempfile.TemporaryDirectory(prefix="mycel-soak-") as folder:
        findings: list[Finding] = []
        try:
            trio.run(soak, Path(folder), asked, findings)
        except* (NotSo, MycelError, trio.TooSlowError) as group:
            print(f"NOT SO: {group.exceptions}", flush=True)
    return 0 if _report(findings, asked.seeds) else 1


if __name__ == "__main__":
    sys.exit(main())
