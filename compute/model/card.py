"""A model's card: what everybody needs to know of it, read without its weights.

Sizes come from the model class built on torch's meta device, not from guesses over tensor names; the rest
from config.json and generation_config.json. Two peers whose cards carry the same fingerprint hold the same
files.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from mycel.compute.engine import ModelCard, ModelUnsupported
from mycel.compute.model import checkpoint, survey
from mycel.compute.model.cache import LayerPlan, plan_layers
from mycel.compute.model.quiet import quiet_transformers

POSITIONS_UNBOUNDED = 1 << 30
"""Said of models whose config names no longest context (recurrent ones)."""
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Described:
    """A model found and looked at: what loading needs beside the card."""

    card: ModelCard
    source: checkpoint.Source
    config: PretrainedConfig
    anatomy: survey.Anatomy
    plans: tuple[LayerPlan, ...]


def read_card(model: str) -> ModelCard:
    """The card of a model, by directory or hub id, without loading weights.

    Raises `FileNotFoundError` (no such model), `ModelUnsupported` (named, with the reason).
    """
    return describe(model).card


def describe(model: str) -> Described:
    """Find a model and read its files down to, and not including, its weights. Raises as `read_card`."""
    source = checkpoint.find(model)
    config = survey.text_part(read_config(source))
    dtype = checkpoint_dtype(source, config)
    try:
        anatomy = survey.examine(config, getattr(torch, dtype).itemsize)
    except ModelUnsupported as error:
        raise ModelUnsupported(f"{source.name}: {error}") from error
    plans = plan_layers(config)
    text = config.get_text_config(decoder=True)
    card = ModelCard(
        name=source.name,
        fingerprint=source.fingerprint(),
        architecture=survey.causal_class(config).__name__,
        n_layers=anatomy.n_layers,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        max_positions=max_positions(text),
        dtype=dtype,
        layer_bytes=anatomy.layer_bytes,
        edge_bytes=anatomy.edge_bytes,
        kv_bytes_per_token_layer=kv_row_bytes(text, plans) * getattr(torch, dtype).itemsize,
        eos_tokens=eos_tokens(source.directory, text),
        batchable=is_batchable(config, plans),
        rewindable=all(plan.is_plain for plan in plans),
    )
    return Described(card, source, config, anatomy, plans)


def read_config(source: checkpoint.Source) -> PretrainedConfig:
    """The model's config; code that a repository ships is never run."""
    try:
        with quiet_transformers():
            config: PretrainedConfig = AutoConfig.from_pretrained(
                str(source.directory), local_files_only=True, trust_remote_code=False
            )
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise ModelUnsupported(f"{source.name}: config.json cannot be used ({error})") from error
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ModelUnsupported(
            f"{source.name}: its weights are quantized ({method}); serve a bfloat16 or float32 checkpoint"
        )
    if config.is_encoder_decoder:
        raise ModelUnsupported(
            f"{source.name}: {config.model_type} is an encoder-decoder, not a causal model"
        )
    return config


def checkpoint_dtype(source: checkpoint.Source, config: PretrainedConfig) -> str:
    """What the checkpoint says its weights are: the config's dtype, else the first floating tensor's."""
    named = getattr(config, "dtype", None) or getattr(config.get_text_config(decoder=True), "dtype", None)
    if named is not None:
        return str(named).removeprefix("torch.")
    here = [name for name in sorted(source.file_bytes) if (source.directory / name).is_file()]
    for entry in checkpoint.read_header(source.directory / here[0]).values() if here else ():
        if entry.dtype in checkpoint.DTYPE_NAMES:
            return checkpoint.DTYPE_NAMES[entry.dtype]
    return "float32"


def max_positions(text: PretrainedConfig) -> int:
    """The longest context the config allows."""
    for name in ("max_position_embeddings", "max_seq_len", "seq_length"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return POSITIONS_UNBOUNDED


def kv_row_bytes(text: PretrainedConfig, plans: tuple[LayerPlan, ...]) -> int:
    """Numbers (not bytes) that one token leaves in one attention layer's cache, key and value."""
    if not any(plan.kind != "dummy" and not plan.is_recurrent for plan in plans):
        return 0
    heads: int = getattr(text, "num_attention_heads")  # noqa: B009 - configs map names at run time
    if getattr(text, "kv_lora_rank", None):  # latent attention caches what it expands later
        return int(text.kv_lora_rank + text.qk_rope_head_dim)
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    if hasattr(text, "multi_query"):  # falcon
        kv_heads = 1 if text.multi_query and not text.new_decoder_architecture else heads
    else:
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
    return int(2 * kv_heads * width)


def eos_tokens(directory: Path, text: PretrainedConfig) -> tuple[int, ...]:
    """Token ids that end a text: generation_config.json's, else the config's."""
    found: Any = None
    path = directory / "generation_config.json"
    if path.is_file():
        try:
            found = json.loads(path.read_text()).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise ModelUnsupported(f"{path} is not readable JSON ({error}); fetch it again") from error
    if found is None:
        found = getattr(text, "eos_token_id", None)
    listed = found if isinstance(found, list) else [found]
    return tuple(token for token in listed if isinstance(token, int))


def is_batchable(config: PretrainedConfig, plans: tuple[LayerPlan, ...]) -> bool:
    """Whether sessions are likely to share a forward: attention can be swapped, no layer is recurrent.

    A loaded stage finds out by trying (`mycel.compute.model.trial`); its own card says what came of it.
    """
    module = sys.modules[survey.causal_class(config).__module__]
    return hasattr(module, "ALL_ATTENTION_FUNCTIONS") and all(plan.is_plain for plan in plans)
