"""Tiny random models of every family, for tests, simulations and trying things out.

They are real checkpoints: config.json and safetensors shards as transformers writes them, small enough to be
made in milliseconds. Their text is noise; their arithmetic is the family's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mycel.compute.model.quiet import quiet_transformers

_SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GATED: dict[str, Any] = _SMALL | {"num_key_value_heads": 2, "intermediate_size": 48}
_SLIDING = ["sliding_attention", "full_attention"]

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _GATED,
    "llama-tied": _GATED | {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": _GATED,
    "qwen3": _GATED | {"head_dim": 8},
    "qwen3_moe": _GATED
    | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "qwen3_next": _GATED
    | {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "mistral": _GATED | {"sliding_window": 8},
    "mixtral": _GATED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma": _GATED | {"head_dim": 8},
    "gemma2": _GATED | {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": _GATED
    | {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8, "layer_types": _SLIDING},
    "gpt2": _SMALL,
    "gpt_neo": _SMALL | {"window_size": 8},
    "gpt_neox": _SMALL | {"intermediate_size": 48},
    "gptj": _SMALL | {"rotary_dim": 4},
    "opt": _SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "opt-350m": _SMALL
    | {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "bloom": {key: value for key, value in _SMALL.items() if key != "max_position_embeddings"},
    "falcon": _SMALL | {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon-alibi": _SMALL
    | {"model_type": "falcon", "alibi": True, "multi_query": False, "parallel_attn": False},
    "mpt": {"vocab_size": 96, "d_model": 32, "n_heads": 4, "max_seq_len": 64},
    "phi": _GATED,
    "phi3": _GATED | {"pad_token_id": 0},
    "starcoder2": _GATED | {"sliding_window": 8},
    "stablelm": _GATED,
    "olmo2": _GATED,
    "olmoe": _GATED | {"num_experts": 4, "num_experts_per_tok": 2},
    "cohere": _GATED,
    "cohere2": _GATED | {"sliding_window": 8, "layer_types": _SLIDING},
    "granite": _GATED | {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 3.0},
    "smollm3": _GATED | {"pad_token_id": 0},
    "glm4": _GATED | {"head_dim": 8, "pad_token_id": 0},
    "gpt_oss": _GATED
    | {"head_dim": 8, "sliding_window": 8, "layer_types": _SLIDING}
    | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": _GATED
    | {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
    },
    "llama4_text": _GATED
    | {
        "head_dim": 8,
        "intermediate_size_mlp": 48,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 8,
        "layer_types": ["chunked_attention", "full_attention"],
        "pad_token_id": 0,
    },
    "bert": _SMALL | {"intermediate_size": 48, "is_decoder": True, "pad_token_id": 0},
    "mamba": {"vocab_size": 96, "hidden_size": 32, "state_size": 8},
}  # fmt: skip
"""Settings of one tiny model per family; the key is the model type unless the settings name one. Layer types
repeat over the layers."""

WHOLE_ONLY: dict[str, dict[str, Any]] = {
    "gemma3n_text": _GATED
    | {
        "head_dim": 8,
        "sliding_window": 8,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 96,
        "altup_num_inputs": 2,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "layer_types": _SLIDING,
        "pad_token_id": 0,
    },
}  # fmt: skip
"""Families that cannot be cut into stages, for what their layers share; the same as `FAMILIES` otherwise."""


def tiny_model(
    path: Path,
    family: str = "llama",
    seed: int = 0,
    layers: int = 4,
    shard_size: str = "50GB",
    **settings: Any,
) -> Path:
    """Write a random model of `family` (of `FAMILIES` or `WHOLE_ONLY`) to directory `path`; returns `path`.

    `settings` override the family's; `shard_size` ("20KB") cuts the checkpoint into several files.
    """
    chosen = (FAMILIES | WHOLE_ONLY)[family] | {"num_hidden_layers": layers} | settings
    model_type = chosen.pop("model_type", family)
    if "layer_types" in chosen:
        pattern = chosen["layer_types"]
        chosen["layer_types"] = [
            pattern[index % len(pattern)] for index in range(chosen["num_hidden_layers"])
        ]
    if model_type == "gpt_neo":
        chosen["attention_types"] = [[["global", "local"], chosen["num_hidden_layers"] // 2]]
    with quiet_transformers():
        config = AutoConfig.for_model(model_type, **chosen)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            for parameter in model.parameters():  # spread out: fresh initialisation makes every token alike
                torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 0.1)
        model.save_pretrained(path, max_shard_size=shard_size)
    return path


def tiny_llama(path: Path, seed: int = 0, **settings: Any) -> Path:
    """A random Llama of 4 layers, 32 wide, 96 tokens of vocabulary, at the directory `path`."""
    return tiny_model(path, "llama", seed, **settings)
