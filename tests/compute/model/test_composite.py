"""Models with a vision tower beside the text: the text part is served, and nothing of the rest is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from mycel.compute.model.card import read_card
from mycel.compute.model.quiet import quiet_transformers

TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 28,
    "patch_size": 14,
}
TOKENS = {"image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92}
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": TOKENS
    | {
        "text_config": TEXT
        | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
        "vision_config": VISION,
        "mm_tokens_per_image": 4,
    },
    "llama4": TOKENS
    | {
        "text_config": TEXT
        | {"intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1}
        | {"attention_chunk_size": 8, "layer_types": ["chunked_attention", "full_attention"] * 2},
        "vision_config": VISION
        | {"projector_input_dim": 16, "projector_output_dim": 16, "vision_output_dim": 16},
    },
    "qwen3_5": {
        "text_config": TEXT
        | {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
        | {"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"] * 2},
        "vision_config": {"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24}
        | {"out_hidden_size": 32, "patch_size": 14},
    },
}
STEPS = [[(7 * index + 3) % 90 for index in range(11)], [5], [80, 2, 3], [44]]


@pytest.fixture(scope="module", params=CONFIGS)
def composite(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("composite") / str(request.param)
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(request.param, **CONFIGS[request.param])
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 0.1)
        model.save_pretrained(path)
    return path


def test_the_text_part_is_cut_bit_identically(
    composite: Path, chain: Callable[..., Any], unsplit: Callable[..., Any], drawn_from: list[torch.Tensor]
) -> None:
    whole = unsplit(composite)
    for cuts in ((0, 2, 4), (0, 1, 3, 4)):
        stages = chain(composite, cuts)
        drawn_from.clear()
        position = 0
        for step in STEPS:
            stages.step([("one", position, step)])
            position += len(step)
        assert all(torch.equal(a, b) for a, b in zip(drawn_from, whole.logits(STEPS), strict=True))
        card = read_card(str(composite))
        held = sum(stage.info.weight_bytes for stage in stages.stages)
        tables = 2 * card.edge_bytes + 4 * card.layer_bytes
        assert held <= tables + 4096, "something beside the text was loaded"
