"""What may stand in a job.toml, kind by kind: one struct each, whose fields are the file's keys.

A field without a default must be given. A field of type `FileName` names a file beside job.toml, which
`mycel submit` takes along as blocks. To add a key, add a field: names, types, bounds, and what the user is
told of a wrong one follow from here.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

Name = Annotated[str, Meta(min_length=1, max_length=128)]
Text = Annotated[str, Meta(max_length=1024)]
FileName = Annotated[str, Meta(min_length=1, max_length=512, title="file")]
Count = Annotated[int, Meta(ge=1, le=1_000_000_000)]
Positive = Annotated[float, Meta(gt=0, le=1e12)]
Share = Annotated[float, Meta(ge=0, le=1)]
Number = Annotated[float, Meta(ge=-1e12, le=1e12)]
Seed = Annotated[int, Meta(ge=0, lt=1 << 48)]
Settings = Annotated[dict[Name, bool | int | float | Text], Meta(max_length=64)]
"""What an application reads: a flat table."""


class Spec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every kind has."""

    KIND: ClassVar[str] = ""
    name: Annotated[str, Meta(max_length=64)] = ""
    """For people. Empty: the kind."""


class SamplingKeys(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[sampling]: how tokens are drawn. The draw for prompt number i is that of seed + i."""

    max_tokens: Annotated[int, Meta(ge=1, le=1_000_000)] = 256
    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.0
    top_k: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    top_p: Share = 1.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] = 1.0
    seed: Seed = 0
    stop: Annotated[tuple[Annotated[str, Meta(min_length=1, max_length=256)], ...], Meta(max_length=16)] = ()


class GenerateSpec(Spec, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file of prompts in, a file of completions out."""

    KIND: ClassVar[str] = "generate"
    model: Name
    """A served model's name."""
    prompts: FileName
    """.jsonl: one JSON text, or object with "prompt" or "messages", in a line; else one prompt a line."""
    output: Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")] = (
        "completions.jsonl"
    )
    """The artefact's name."""
    sampling: SamplingKeys = SamplingKeys()
    at_once: Annotated[int, Meta(ge=1, le=64)] = 4
    """Prompts that one peer works on at a time; its model's stages compute them in one batch."""


class FederateSpec(Spec, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rounds of local training, where the data stays home."""

    KIND: ClassVar[str] = "federate"
    app: Name
    """A built-in application (classifier, causal-lm), or with `code` a name for the submitter's own."""
    code: FileName | None = None
    """The submitter's own application, one Python file; it runs where owners trust the submitter."""
    data: Name
    """The name under which owners offer the data."""
    strategy: Name = "fedavg"
    tuning: Annotated[dict[Name, int | float], Meta(max_length=64)] = {}
    """[tuning]: the strategy's own settings."""
    rounds: Count = 10
    clients: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    """Updates that close a round at once; 0: of all that have data."""
    quorum: Annotated[int, Meta(ge=1, le=1_000_000)] = 1
    """Updates without which a round fails."""
    oversample: Annotated[float, Meta(ge=0, le=4)] = 0.0
    """How many more clients than wanted are asked, as a share."""
    round_s_max: Annotated[float, Meta(gt=0, le=1e7)] = 600.0
    patience_s: Annotated[float, Meta(ge=0, le=1e7)] = 30.0
    """How long a round that is short of clients waits for some."""
    evaluate_every: Annotated[int, Meta(ge=0, le=1_000_000)] = 1
    """Have clients judge the model after every so many rounds; 0: never."""
    fan_out: Annotated[int, Meta(ge=0, le=1024)] = 0
    """Clients below each aggregator of a tree, for linear strategies; 0: no tree."""
    seed: Seed = 0
    model: FileName | None = None
    """Where to begin; without it the application makes one of the seed."""
    settings: Settings = {}
    """[settings]: for the application."""


class TrainSpec(Spec, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model, trained together by DiLoCo."""

    KIND: ClassVar[str] = "train"
    app: Name
    """A built-in application (causal-lm), or with `code` a name for the submitter's own."""
    code: FileName | None = None
    """The submitter's own application, one Python file; it runs where owners trust the submitter."""
    data: FileName | None = None
    """Training data that the submitter brings..."""
    offered: Name | None = None
    """...or the name under which owners offer theirs."""
    model: FileName | None = None
    """Where to begin, weights or an earlier job's checkpoint; without it one is made of the seed."""
    steps: Count = 1000
    """Inner steps of each peer, in all."""
    inner_steps: Annotated[int, Meta(ge=1, le=1_000_000)] = 50
    """Local steps between two outer ones."""
    batch: Annotated[int, Meta(ge=1, le=1_000_000)] = 8
    peers: Annotated[int, Meta(ge=1, le=1_000_000)] = 1
    """Peers without which it waits."""
    quorum: Annotated[str, Meta(pattern="^(majority|any)$")] = "majority"
    """Whose voices it takes to go on without those who vanish: those of most members, or "any", where a part
    that is no majority goes on too (with `peers` of them) and, of two parts, the longer course stays."""
    overlap: bool = False
    """Take inner steps while the way of those before is summed up, and apply that sum one border late."""
    codec: Annotated[str, Meta(pattern="^(none|int8|int4)$")] = "int8"
    """How outer steps travel."""
    seed: Seed = 0
    settings: Settings = {}
    """[settings]: for the application, its model and its optimizers."""


KINDS: dict[str, type[Spec]] = {spec.KIND: spec for spec in (TrainSpec, FederateSpec, GenerateSpec)}
AnySpec = TrainSpec | FederateSpec | GenerateSpec
