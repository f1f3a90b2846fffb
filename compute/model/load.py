"""Load a stage: build the gated model, find the tensors it asks for, map exactly those, check that all came.

transformers renames and converts checkpoint tensors on loading (fused experts, old names), by tables of its
own. The same tables are asked here, backwards as it were: every tensor name in the checkpoint is renamed, and
those whose new name the gated model has are wanted. So a middle stage opens only the files of its own layers.
Weights on the CPU stay mapped from the files: files of a model in use must not be changed in place.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from mycel.compute.engine import ModelUnsupported, Span, StageInfo, StageSpec
from mycel.compute.model import checkpoint, split, survey
from mycel.compute.model.card import DTYPES, Described, describe
from mycel.compute.model.forward import Forward
from mycel.compute.model.quiet import quiet_transformers
from mycel.compute.model.stage import Stage
from mycel.compute.model.trial import try_out

Progress = Callable[[float, str], None]


def load_stage(spec: StageSpec, progress: Progress | None = None) -> Stage:
    """Load the layers `spec.span` of `spec.model`. `progress` gets (fraction, what).

    Raises `FileNotFoundError` (no such model), `ModelUnsupported` (it cannot be loaded or cut, or its files
    are damaged; the text names the tensor), `ValueError` (a span, dtype or device that makes no sense).
    """
    say = progress or (lambda fraction, what: None)
    began = time.perf_counter()
    say(0.0, f"reading {spec.model}")
    described = describe(spec.model)
    span = check_span(described, spec.span)
    device = choose_device(spec.device)
    dtype = choose_dtype(described, spec.dtype)
    if spec.threads != torch.get_num_threads():
        torch.set_num_threads(spec.threads or usable_cores())
    model = load_weights(described, span, dtype, say)
    say(0.9, f"moving to {device}")
    torch.nn.Module.to(model, device)
    forward = Forward(model, described.anatomy, described.plans)
    say(0.95, "trying it out")
    try:
        with torch.inference_mode():
            trial = try_out(forward, span, described.card.hidden_size, described.card.vocab_size)
    except ModelUnsupported as error:
        raise ModelUnsupported(f"{described.card.name} ({described.card.architecture}): {error}") from error
    info = StageInfo(
        card=msgspec.structs.replace(described.card, batchable=trial.way is not None),
        span=span,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        weight_bytes=sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]),
        load_s=time.perf_counter() - began,
    )
    say(1.0, "ready")
    return Stage(forward, trial, info, spec.kv_bytes_max)


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_span(described: Described, span: Span | None) -> Span:
    """The span to load; refuses one that is empty, outside the model, or a cut the model does not allow."""
    n_layers = described.anatomy.n_layers
    chosen = span or Span(0, n_layers)
    if not 0 <= chosen.start < chosen.end <= n_layers:
        raise ValueError(
            f"{described.card.name} has layers 0:{n_layers}; {chosen.start}:{chosen.end} is no span of it"
        )
    refusal = described.anatomy.split_refusal
    if refusal and chosen != Span(0, n_layers):
        raise ModelUnsupported(
            f"{described.card.name} ({described.card.architecture}) cannot be cut into stages: {refusal}; "
            f"serve it whole (layers 0:{n_layers})"
        )
    return chosen


def choose_device(asked: str) -> torch.device:
    """The device asked for, or the first GPU, else the CPU. Raises `ValueError` for one that is not here."""
    if asked == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise ValueError(f"{asked!r} is no device: say cpu, cuda, cuda:N or auto") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{asked!r}: stages run on cpu and cuda")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(f"{asked!r} is not here: this machine shows torch {count} GPUs")
        return torch.device("cuda", device.index or 0)
    return device


def choose_dtype(described: Described, asked: str) -> torch.dtype:
    """The dtype asked for, or the checkpoint's own."""
    name = described.card.dtype if asked == "auto" else asked
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r}: say one of {', '.join(DTYPES)}, or auto")
    chosen: torch.dtype = getattr(torch, name)
    return chosen


def load_weights(described: Described, span: Span, dtype: torch.dtype, say: Progress) -> PreTrainedModel:
    """The gated model of `span` on the CPU, every weight from the checkpoint."""
    name, config = described.card.name, described.config
    builder: Any = split.stage_class(described.anatomy, survey.causal_class(config), span)
    source = checkpoint.name_tensors(described.source)
    wanted = wanted_tensors(builder, config, list(source.weight_map))
    say(0.05, f"fetching {len({source.weight_map[tensor] for tensor in wanted})} files")
    source = checkpoint.fetch(source, wanted)
    total = max(1, len(wanted))
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += 1
        say(min(0.9, 0.1 + 0.8 * done / total), "loading weights")

    tensors, opened = checkpoint.open_tensors(source, wanted, count)
    try:
        with quiet_transformers():
            model, report = builder.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except (RuntimeError, SafetensorError, ValueError, OSError) as error:
        raise ModelUnsupported(f"{name}: its weights do not load ({error})") from error
    finally:
        for handle in opened:
            handle.__exit__(None, None, None)
    check_complete(name, model, report)
    loaded: PreTrainedModel = model
    loaded.eval()
    return loaded  # requires_grad stays set: torch.matmul folds by it, and that shows in the last bit


def wanted_tensors(
    stage_class: type[PreTrainedModel], config: PretrainedConfig, names: list[str]
) -> list[str]:
    """Names in the checkpoint whose tensors the gated model has a place for."""
    empty = survey.build_empty(stage_class, config)
    places = empty.state_dict()
    conversions = get_model_conversion_mapping(empty)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    prefix = empty.base_model_prefix
    wanted = []
    for name in names:
        renamed, _ = rename_source_key(name, renamings, converters, prefix, places)
        if renamed in places or name in places:
            wanted.append(name)
    return wanted


def check_complete(name: str, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """Raise `ModelUnsupported` unless every parameter came from the checkpoint, every buffer from somewhere.

    Without this a tensor that is missing would silently be random.
    """
    for what, key in (("missing from", "missing_keys"), ("not of the right shape in", "mismatched_keys")):
        found = sorted(str(entry) for entry in report[key])
        if found:
            raise ModelUnsupported(
                f"{name}: {len(found)} tensors are {what} its checkpoint, first {found[0]}; fetch it again"
            )
    problems = [*report.get("error_msgs", []), *map(str, (report.get("conversion_errors") or {}).values())]
    if problems:
        raise ModelUnsupported(f"{name}: its weights do not convert ({problems[0]})")
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        left = [path for path, tensor in tensors if tensor.is_meta]
        if left:
            raise ModelUnsupported(
                f"{name}: {kind} {left[0]} was not in the checkpoint nor made by the model"
            )
    unknown = unknown_buffers(model)
    if unknown:
        raise ModelUnsupported(
            f"{name}: buffer {unknown[0]} is not in the checkpoint and transformers does not set it up; "
            "it would hold whatever was in memory"
        )


def unknown_buffers(model: PreTrainedModel) -> list[str]:
    """Buffers that no checkpoint saves and the model's own initialisation leaves as they are.

    Found by spoiling a copy of each and asking the model to initialise it again.
    """
    found = []
    owners: dict[str, Any] = {"": model}
    for path, module in model.named_modules():
        owner = owners[path] = (
            module if isinstance(module, PreTrainedModel) else owners[path.rpartition(".")[0]]
        )
        names = sorted(module._non_persistent_buffers_set)
        if not names or next(module.parameters(recurse=False), None) is not None:
            continue
        kept = {name: module._buffers[name] for name in names}
        for name, buffer in kept.items():
            if buffer is not None:
                module._buffers[name] = torch.full_like(buffer, 77)
        with torch.no_grad():
            owner._init_weights(module)
        for name, buffer in kept.items():
            made = module._buffers[name]
            if buffer is not None and (made is None or not torch.equal(made, buffer)):
                found.append(f"{path}.{name}")
            module._buffers[name] = buffer
    return found
