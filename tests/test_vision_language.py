"""LLaVA and DeepSeek-VL checkpoints: what their configs mean, and published weights in and out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vl_jax import params as params_lib
from vl_jax.encoders.adapter import AdapterConfig
from vl_jax.encoders.high_resolution import HighResolutionConfig
from vl_jax.interop import rules
from vl_jax.interop.safetensors import WeightsError
from vl_jax.interop.vision_language import (
    IGNORED,
    read_vision_language,
    vision_language_rules,
    vision_language_stacks,
)
from vl_jax.layout import abstract
from vl_jax.model import VisionLanguage

TEXT = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TEXTS: dict[str, dict[str, Any]] = {
    "llama": TEXT,
    "mixtral": {**TEXT, "model_type": "mixtral", "num_local_experts": 2, "num_key_value_heads": 1},
    "deepseek_v3": {
        **TEXT,
        "model_type": "deepseek_v3",
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 4,
        "qk_rope_head_dim": 2,
        "qk_nope_head_dim": 2,
        "v_head_dim": 2,
    },
}
EYES = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
SAM = {
    **EYES,
    "image_size": 16,
    "output_channels": 4,
    "mlp_dim": 8,
    "window_size": 3,
    "global_attn_indexes": [1],
}
# One of each kind; the cases are variations.
PUBLISHED: dict[str, dict[str, Any]] = {
    "deepseek_vl": {"text_config": TEXT, "vision_config": EYES},
    "deepseek_vl_hybrid": {"text_config": TEXT, "vision_config": EYES, "high_res_vision_config": SAM},
    "llava": {"text_config": TEXT, "vision_config": EYES},
}


def published(kind: str, **options: Any) -> dict[str, Any]:
    return {"model_type": kind, **PUBLISHED[kind], **options}


def plan_of(config: Mapping[str, Any], keys: Any = ()) -> tuple[rules.Plan, Any]:
    model = read_vision_language(config)
    shapes = abstract(model)
    if model.moe.scheme == "loss_free":
        bias = jax.ShapeDtypeStruct((len(model.language.sparse_layers), model.moe.num_experts), jnp.float32)
        shapes = {**shapes, "routing": {"bias": bias}}
    sizes = {path: tuple(leaf.shape) for path, leaf in params_lib.flatten(shapes).items()}
    table = vision_language_rules(config, keys)
    return rules.plan(table, sizes, vision_language_stacks(model)), shapes


def assert_round_trip(config: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> None:
    plan, shapes = plan_of(config, weights)
    again = dict(rules.export(plan, rules.read(plan, weights, shapes, ignored=IGNORED)))
    assert again.keys() == weights.keys()
    for key, array in weights.items():
        np.testing.assert_array_equal(again[key], array, err_msg=key)


def written(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    plan, shapes = plan_of(config)
    draw = np.random.default_rng(0)
    tree = params_lib.map_paths(lambda _, leaf: draw.normal(size=leaf.shape).astype(np.float32), shapes)
    return dict(rules.export(plan, tree))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", PUBLISHED)
@pytest.mark.slow
def test_weights_go_out_as_they_came_in(kind: str, text: str):
    config = published(kind, text_config=TEXTS[text])
    assert_round_trip(config, written(config))


# What tensors were called before, and are called in memory.
RENAMED = {
    "llava": {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.": "model.vision_tower.vision_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
    "deepseek_vl": {"model.vision_model.": "model.vision_model.vision_model."},
    "deepseek_vl_hybrid": {"model.vision_model.": "model.vision_model.vision_model."},
}


@pytest.mark.parametrize("kind", PUBLISHED)
@pytest.mark.slow
def test_names_of_another_generation_are_kept(kind: str):
    config = published(kind)

    def renamed(key: str) -> str:
        starts = [old for old in RENAMED[kind] if key.startswith(old)]
        return RENAMED[kind][starts[0]] + key.removeprefix(starts[0]) if starts else key

    weights = {renamed(key): array for key, array in written(config).items()}
    assert weights.keys() != written(config).keys()
    assert_round_trip(config, weights)


def test_a_missing_and_an_unknown_tensor_are_named():
    config = published("llava")
    weights = written(config)
    weights["vision_tower.more"] = weights.pop("multi_modal_projector.linear_2.bias")
    weights["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)
    plan, shapes = plan_of(config, weights)
    with pytest.raises(WeightsError, match="2 problems") as caught:
        rules.read(plan, weights, shapes, ignored=IGNORED)
    assert "linear_2.bias is missing" in str(caught.value) and "vision_tower.more" in str(caught.value)


def test_what_a_llava_config_leaves_out_has_the_official_value():
    model = read_vision_language({"model_type": "llava"})
    assert model.encoder is not None
    assert (model.encoder.image_size, model.encoder.patch_size, model.encoder.num_layers) == (336, 14, 24)
    assert (model.encoder.feature_layers, model.encoder.class_feature) == ((-2,), True)
    assert model.adapter == AdapterConfig(downsample=1, skip=1, separators=False)
    assert (model.language.num_layers, model.language.vocab_size) == (32, 32_000)
    plain = read_vision_language({"model_type": "llava", "vision_config": {}}).encoder
    assert plain is not None and (plain.image_size, plain.patch_size) == (224, 32)


def test_what_a_deepseek_vl_config_leaves_out_has_the_official_value():
    model = read_vision_language({"model_type": "deepseek_vl_hybrid"})
    assert model.encoder is not None and model.high_resolution is not None
    assert (model.encoder.image_size, model.encoder.patch_size, model.encoder.pooling) == (
        224,
        16,
        "attention",
    )
    assert model.high_resolution == HighResolutionConfig(grid=14)
    assert model.adapter.num_layers == 0
    assert read_vision_language({"model_type": "deepseek_vl"}).adapter == AdapterConfig(
        downsample=1, separators=False
    )


def test_llava_options_reach_encoder_and_projector():
    model = read_vision_language(
        published(
            "llava",
            vision_feature_layer=[-1, 0],
            vision_feature_select_strategy="full",
            projector_hidden_act="quick_gelu",
            multimodal_projector_bias=False,
        )
    )
    assert model.encoder is not None and model.encoder.feature_layers == (-1, 0)
    assert model.adapter == AdapterConfig(
        downsample=1, activation="quick_gelu", use_bias=False, separators=False
    )
    shapes = params_lib.flatten(abstract(model))
    assert shapes["adapter/layer_0/kernel"].shape == (16, 16) and "adapter/layer_0/bias" not in shapes


@pytest.mark.parametrize(
    ("vision", "strategy", "tokens"),
    [
        ("clip_vision_model", "full", 5),
        ("clip_vision_model", "default", 4),
        ("siglip_vision_model", "full", 4),
        ("siglip_vision_model", "default", 3),  # there is no class token: the first patch is lost
    ],
)
def test_llava_drops_the_first_token_of_any_encoder(vision: str, strategy: str, tokens: int):
    config = published("llava", vision_feature_select_strategy=strategy)
    config["vision_config"] = {**EYES, "model_type": vision}
    network = VisionLanguage(read_vision_language(config))

    def run(network: VisionLanguage) -> jax.Array:
        return network.adapter.project(network.encode(jnp.zeros((1, 8, 8, 3))).tokens)

    found, _ = jax.eval_shape(lambda: network.init_with_output(jax.random.key(0), method=run))
    assert found.shape == (1, tokens, 16)


@pytest.mark.parametrize(
    ("kind", "outer", "inner", "tied"),
    [
        ("llava", False, True, True),
        ("llava", True, False, True),
        ("llava", None, False, False),
        ("deepseek_vl", None, True, True),
        ("deepseek_vl", None, None, False),
        ("deepseek_vl", False, True, False),
        ("deepseek_vl", True, None, True),
    ],
)
@pytest.mark.slow
def test_who_says_that_the_head_is_the_embedding_table(kind: str, outer: Any, inner: Any, tied: bool):
    config = published(kind)
    if outer is not None:
        config["tie_word_embeddings"] = outer
    if inner is not None:
        config["text_config"] = {**TEXT, "tie_word_embeddings": inner}
    assert read_vision_language(config).language.tie_embeddings == tied
    assert any("lm_head" in key for key in written(config)) != tied


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "blip"}, "model_type='blip': known are deepseek_vl, deepseek_vl_hybrid, llava"),
        (published("llava", vision_feature_select_strategy="cls"), "select_strategy='cls': known are"),
        (published("llava", projector_hidden_act="mish"), "projector_hidden_act='mish': known are"),
        (published("llava", text_config={"model_type": "bloom"}), "model_type='bloom': known are"),
        (published("llava", vision_feature_layer=3), "feature_layers: 3 is not one of the 3 hidden states"),
    ],
)
def test_what_is_not_supported_is_refused_in_one_line(config: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message) as caught:
        read_vision_language(config)
    assert "\n" not in str(caught.value)


def test_two_parts_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"2 tensors are called 'embed_tokens\.weight'; expected one"):
        vision_language_rules(published("llava"), ["a.embed_tokens.weight", "b.embed_tokens.weight"])
