"""Configs of published language models: what a field means differs from model to model."""

from __future__ import annotations

import pytest

from vl_jax.interop.language import read_deepseek, read_language

OPTIONS = {
    "norm_topk_prob": True,
    "n_routed_experts": 4,
    "num_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
}


@pytest.mark.parametrize(
    ("read", "model_type", "single"),
    # The code released with DeepSeek-VL2 leaves a single gate as it is; others divide it by itself.
    [
        (read_deepseek, "deepseek_v2", False),
        (read_language, "deepseek_v3", True),
        (read_language, "olmoe", True),
    ],
    ids=["as released", "V3", "OLMoE"],
)
def test_a_single_gate_is_normalised_as_the_code_of_the_model_does(read, model_type, single):
    for top_k, expected in ((1, single), (2, True)):
        config = read({**OPTIONS, "model_type": model_type, "num_experts_per_tok": top_k})
        assert config.moe.gates.normalize == expected
