"""Published language models: their configs as ours, and where each of their tensors goes.

One decoder serves them all. What a published ``config.json`` leaves out takes the default of the official
class; an explicit null is a value of its own (DeepSeek-V2: absent ``q_lora_rank`` is 1536, null means no such
projection).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vl_jax.interop.rules import Rule
from vl_jax.kernels.activation import Activation
from vl_jax.language.decoder import DecoderConfig
from vl_jax.language.gqa import GQAConfig
from vl_jax.language.mla import MLAConfig
from vl_jax.moe.config import BalanceConfig, ExpertGroupsConfig, GateConfig, SharedExpertsConfig
from vl_jax.moe.routing import MoEConfig
from vl_jax.nn.rope import RopeConfig, YarnConfig

Fields = Mapping[str, Any]
NO_BALANCE = BalanceConfig(weight=0.0)  # of every class but DeepSeek's own


@dataclass(frozen=True)
class LanguageConfig:
    """A decoder and its experts; a dense model never reads the second."""

    decoder: DecoderConfig
    moe: MoEConfig


@dataclass(frozen=True)
class LanguageFamily:
    """Models that share a config class: its defaults, and how to read it."""

    defaults: Fields
    read: Callable[[Fields], LanguageConfig]


def read_language(config: Fields) -> LanguageConfig:
    """Our configuration of a published language model.

    Raises:
      ValueError: the model type is not known, or an option is not supported.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"model_type={kind!r}: known are {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[kind]
    return family.read({**family.defaults, **config})


def read_deepseek(config: Fields) -> LanguageConfig:
    """Our configuration of the language model inside DeepSeek-VL2, whose class has defaults of its own."""
    return _deepseek({**_DEEPSEEK_V2, **config})


def _llama(c: Fields) -> LanguageConfig:
    decoder = _decoder(c, _gqa(c, qkv_bias=c["attention_bias"], output_bias=c["attention_bias"]))
    return LanguageConfig(decoder, MoEConfig())


def _deepseek(c: Fields) -> LanguageConfig:
    """DeepSeek-V2 as released with DeepSeek-VL2, where ``use_mla`` false means plain multi-head attention."""
    biased = c["topk_method"] == "noaux_tc"
    if c["topk_method"] not in ("greedy", "group_limited_greedy", "noaux_tc"):
        raise ValueError(
            f"topk_method={c['topk_method']!r}: known are greedy, group_limited_greedy, noaux_tc"
        )
    if c["scoring_func"] not in ("softmax", "sigmoid"):
        raise ValueError(f"scoring_func={c['scoring_func']!r}: known are softmax, sigmoid")
    limited = c["topk_method"] != "greedy"
    moe = _deepseek_experts(
        c,
        scheme="loss_free" if biased else "top_k",
        score=c["scoring_func"],
        # A single gate is kept as it is, by this code alone.
        normalize=c["norm_topk_prob"] and c["num_experts_per_tok"] != 1,
        groups=_groups_of(c, limited=limited),
        balance=BalanceConfig(weight=c["aux_loss_alpha"], scope="sequence" if c["seq_aux"] else "batch"),
    )
    bias = c["attention_bias"]
    attention = _mla(c) if c["use_mla"] else _gqa(c, qkv_bias=bias, output_bias=bias)
    return LanguageConfig(_decoder(c, attention), moe)


def _deepseek_v2(c: Fields) -> LanguageConfig:
    """The class of the transformers library: softmax scores, never normalised."""
    limited = c["topk_method"] == "group_limited_greedy"
    moe = _deepseek_experts(c, groups=_groups_of(c, limited=limited))
    return LanguageConfig(_decoder(c, _mla(c)), moe)


def _deepseek_v3(c: Fields) -> LanguageConfig:
    moe = _deepseek_experts(
        c,
        scheme="loss_free",
        score="sigmoid",
        normalize=c["norm_topk_prob"],
        groups=ExpertGroupsConfig(c["n_group"] or 1, c["topk_group"] or 1),
    )
    pairs = "adjacent" if c["rope_interleave"] else "halves"
    return LanguageConfig(_decoder(c, _mla(c, pairs=pairs)), moe)


def _groups_of(c: Fields, *, limited: bool) -> ExpertGroupsConfig:
    """One group of all experts unless the choice is limited to some groups."""
    num, top = (c["n_group"] or 1, c["topk_group"] or 1) if limited else (1, 1)
    return ExpertGroupsConfig(num, top, excluded="zero")


def _deepseek_experts(c: Fields, *, score: Any = None, normalize: bool = False, **options: Any) -> MoEConfig:
    if not c["n_routed_experts"]:
        return MoEConfig()
    return MoEConfig(
        num_experts=c["n_routed_experts"],
        top_k=c["num_experts_per_tok"],
        expert_dim=c["moe_intermediate_size"],
        shared=SharedExpertsConfig(num=c["n_shared_experts"] or 0),
        gates=GateConfig(score, normalize, c["routed_scaling_factor"]),
        activation=Activation(c["hidden_act"]),
        **{"balance": NO_BALANCE, **options},
    )


def _mixtral(c: Fields) -> LanguageConfig:
    moe = MoEConfig(
        num_experts=c["num_local_experts"],
        top_k=c["num_experts_per_tok"],
        expert_dim=c["intermediate_size"],
        shared=SharedExpertsConfig(num=0),
        gates=GateConfig(normalize=True),
        activation=Activation(c["hidden_act"]),
        balance=NO_BALANCE,
    )
    return LanguageConfig(_decoder(c, _gqa(c)), moe)


def _qwen2_moe(c: Fields) -> LanguageConfig:
    moe = MoEConfig(
        num_experts=c["num_experts"],
        top_k=c["num_experts_per_tok"],
        expert_dim=c["moe_intermediate_size"],
        shared=SharedExpertsConfig(num=1, dim=c["shared_expert_intermediate_size"], gate=True),
        gates=GateConfig(normalize=c["norm_topk_prob"]),
        activation=Activation(c["hidden_act"]),
        balance=NO_BALANCE,
    )
    return LanguageConfig(_decoder(c, _gqa(c, qkv_bias=c["qkv_bias"])), moe)


def _olmoe(c: Fields) -> LanguageConfig:
    bias = c["attention_bias"]
    attention = _gqa(c, qkv_bias=bias, output_bias=bias, qk_norm=True, clip=c["clip_qkv"])
    moe = MoEConfig(
        num_experts=c["num_experts"],
        top_k=c["num_experts_per_tok"],
        expert_dim=c["intermediate_size"],
        shared=SharedExpertsConfig(num=0),
        gates=GateConfig(normalize=c["norm_topk_prob"]),
        activation=Activation(c["hidden_act"]),
        balance=NO_BALANCE,
    )
    return LanguageConfig(_decoder(c, attention), moe)


def _gpt_oss(c: Fields) -> LanguageConfig:
    bias = c["attention_bias"]
    moe = MoEConfig(
        scheme="top_k_softmax",
        num_experts=c["num_local_experts"],
        top_k=c["num_experts_per_tok"],
        expert_dim=c["intermediate_size"],
        shared=SharedExpertsConfig(num=0),
        router_bias=True,
        expert_bias=True,
        activation=Activation(c["hidden_act"], limit=c["swiglu_limit"], alpha=c["swiglu_alpha"]),
        balance=NO_BALANCE,
    )
    return LanguageConfig(_decoder(c, _gqa(c, qkv_bias=bias, output_bias=bias, sinks=True)), moe)


def _decoder(c: Fields, attention: MLAConfig | GQAConfig) -> DecoderConfig:
    layers = c["num_hidden_layers"]
    first = min(c.get("first_k_dense_replace", 0), layers) if _has_experts(c) else layers
    every, only = c.get("moe_layer_freq", 1), c.get("mlp_only_layers") or ()
    step = c.get("decoder_sparse_step", 1)
    others = [
        i
        for i in range(first, layers)
        if i % every or i in only or (step > 0 and (i + 1) % step) or step == 0
    ]
    return DecoderConfig(
        vocab_size=c["vocab_size"],
        embed_dim=c["hidden_size"],
        mlp_dim=c["intermediate_size"],
        num_layers=layers,
        num_dense_layers=first,
        other_dense_layers=tuple(others),
        attention=attention,
        windows=_windows(c, layers),
        activation=Activation(c["hidden_act"]),
        mlp_bias=c.get("mlp_bias", False),
        norm_epsilon=c["rms_norm_eps"],
        tie_embeddings=c["tie_word_embeddings"],
    )


def _has_experts(c: Fields) -> bool:
    return bool(c.get("n_routed_experts") or c.get("num_local_experts") or c.get("num_experts"))


def _windows(c: Fields, layers: int) -> tuple[int, ...]:
    """For every layer how many tokens it looks back on; Qwen2's switch comes before its number."""
    window = c.get("sliding_window") if c.get("use_sliding_window", True) else None
    if not window:
        return ()
    kinds = c.get("layer_types")
    if kinds is None:
        first = c.get("max_window_layers", 0)
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    return windows if any(windows) else ()


def _gqa(c: Fields, **options: Any) -> GQAConfig:
    heads = c["num_attention_heads"]
    return GQAConfig(
        num_heads=heads,
        num_kv_heads=c.get("num_key_value_heads") or heads,
        head_dim=c.get("head_dim") or c["hidden_size"] // heads,
        rope=read_rope(c),
        norm_epsilon=c["rms_norm_eps"],
        **options,
    )


def _mla(c: Fields, *, pairs: str = "adjacent") -> MLAConfig:
    return MLAConfig(
        num_heads=c["num_attention_heads"],
        q_lora_rank=c["q_lora_rank"],
        kv_lora_rank=c["kv_lora_rank"],
        qk_nope_dim=c["qk_nope_head_dim"],
        qk_rope_dim=c["qk_rope_head_dim"],
        v_head_dim=c["v_head_dim"],
        rope=read_rope(c, pairs=pairs),
        use_bias=c["attention_bias"],
    )


def read_rope(c: Fields, *, pairs: str = "halves") -> RopeConfig:
    """Rotary options, in the new form (``rope_parameters``) or the old (``rope_theta``, ``rope_scaling``)."""
    options = {**(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
    kind = options.get("rope_type", options.get("type", "default"))
    theta = float(options.get("rope_theta", c.get("rope_theta", 10_000.0)))
    if kind == "default":
        return RopeConfig(theta, pairs)  # pyright: ignore[reportArgumentType]
    if kind == "linear":
        return RopeConfig(theta, pairs, float(options["factor"]))  # pyright: ignore[reportArgumentType]
    if kind != "yarn":
        raise ValueError(f"rope_type={kind!r}: known are default, linear, yarn")
    yarn = YarnConfig(
        factor=float(options["factor"]),
        original_length=options.get("original_max_position_embeddings") or c["max_position_embeddings"],
        beta_fast=float(options.get("beta_fast") or 32.0),
        beta_slow=float(options.get("beta_slow") or 1.0),
        truncate=options.get("truncate", True),
        mscale=float(options.get("mscale") or 1.0),
        mscale_all_dim=float(options.get("mscale_all_dim") or 0.0),
        attention_factor=options.get("attention_factor"),
    )
    return RopeConfig(theta, pairs, yarn=yarn)  # pyright: ignore[reportArgumentType]


_COMMON = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
}
_DEEPSEEK_V2 = {
    **_COMMON,
    "vocab_size": 102_400,
    "moe_intermediate_size": 1407,
    "num_hidden_layers": 30,
    "n_shared_experts": None,
    "n_routed_experts": None,
    "num_experts_per_tok": None,
    "n_group": None,
    "topk_group": None,
    "routed_scaling_factor": 1.0,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "topk_method": None,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 0,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "use_mla": True,
}
# Model type to the defaults of the official config class.
FAMILIES: dict[str, LanguageFamily] = {
    "llama": LanguageFamily(_COMMON, _llama),
    "deepseek_v2": LanguageFamily(
        {
            **_DEEPSEEK_V2,
            "vocab_size": 32_000,
            "num_hidden_layers": 32,
            "n_shared_experts": 2,
            "n_routed_experts": 64,
            "topk_method": "greedy",
        },
        _deepseek_v2,
    ),
    "deepseek_v3": LanguageFamily(
        {
            **_DEEPSEEK_V2,
            "vocab_size": 129_280,
            "hidden_size": 7168,
            "intermediate_size": 18_432,
            "moe_intermediate_size": 2048,
            "num_hidden_layers": 61,
            "num_attention_heads": 128,
            "n_shared_experts": 1,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "routed_scaling_factor": 2.5,
            "first_k_dense_replace": 3,
            "norm_topk_prob": True,
            "rope_interleave": True,
            "max_position_embeddings": 4096,
        },
        _deepseek_v3,
    ),
    "mixtral": LanguageFamily(
        {
            **_COMMON,
            "intermediate_size": 14_336,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "sliding_window": None,
            "num_experts_per_tok": 2,
            "num_local_experts": 8,
        },
        _mixtral,
    ),
    "qwen2_moe": LanguageFamily(
        {
            **_COMMON,
            "vocab_size": 151_936,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_window_layers": 28,
            "decoder_sparse_step": 1,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts_per_tok": 4,
            "num_experts": 60,
            "norm_topk_prob": False,
            "qkv_bias": True,
        },
        _qwen2_moe,
    ),
    "olmoe": LanguageFamily(
        {
            **_COMMON,
            "vocab_size": 50_304,
            "hidden_size": 2048,
            "intermediate_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "rms_norm_eps": 1e-5,
            "clip_qkv": None,
            "num_experts_per_tok": 8,
            "num_experts": 64,
            "norm_topk_prob": False,
        },
        _olmoe,
    ),
    "gpt_oss": LanguageFamily(
        {
            **_COMMON,
            "vocab_size": 201_088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 36,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150_000.0,
            "sliding_window": 128,
            "num_experts_per_tok": 4,
            "num_local_experts": 128,
            "attention_bias": True,
            "swiglu_limit": 7.0,
            "swiglu_alpha": 1.702,
        },
        _gpt_oss,
    ),
}


# (name below a layer of the source, path below a layer of ours, axes without the layer[, parts])
_Row = tuple[Any, ...]


def _experts(name: str, gate: str, up: str, down: str) -> tuple[_Row, ...]:
    """Routed experts with a tensor each."""
    return (
        (name + ".{expert}.{part}.weight", "moe/w_in", "expert part f d -> expert d part f", (gate, up)),
        (name + ".{expert}." + down + ".weight", "moe/w_out", "expert d f -> expert f d"),
    )


@dataclass(frozen=True)
class Names:
    """How tensors are called, where families differ."""

    base: str = "model."  # before ``embed_tokens`` and ``layers``
    head: str = "lm_head.weight"
    router: str = "mlp.gate."
    shared: str = "mlp.shared_experts."
    experts: tuple[_Row, ...] = _experts("mlp.experts", "gate_proj", "up_proj", "down_proj")


# Model types whose tensors have names of their own.
NAMES = {
    "mixtral": Names(
        router="block_sparse_moe.gate.",
        experts=_experts("block_sparse_moe.experts", "w1", "w3", "w2"),
    ),
    "qwen2_moe": Names(shared="mlp.shared_expert."),
    "gpt_oss": Names(
        router="mlp.router.",
        experts=(
            ("mlp.experts.gate_up_proj", "moe/w_in", "expert d (f part) -> expert d part f"),
            ("mlp.experts.gate_up_proj_bias", "moe/b_in", "expert (f part) -> expert part f"),
            ("mlp.experts.down_proj", "moe/w_out", "expert f d -> expert f d"),
            ("mlp.experts.down_proj_bias", "moe/b_out", "expert d -> expert d"),
        ),
    ),
}
_GATE_UP = ("gate", "up")
_GQA: tuple[_Row, ...] = (
    ("q_proj.weight", "attention/query", "(n h) d -> d n h"),
    ("q_proj.bias", "attention/query_bias", "(n h) -> n h"),
    ("k_proj.weight", "attention/key", "(n h) d -> d n h"),
    ("k_proj.bias", "attention/key_bias", "(n h) -> n h"),
    ("v_proj.weight", "attention/value", "(n h) d -> d n h"),
    ("v_proj.bias", "attention/value_bias", "(n h) -> n h"),
    ("q_norm.weight", "attention/query_norm/scale", "d -> d"),
    ("k_norm.weight", "attention/key_norm/scale", "d -> d"),
    ("sinks", "attention/sinks", "n -> n"),
)
_MLA: tuple[_Row, ...] = (
    ("kv_a_proj_with_mqa.weight", "attention/kv_down/kernel", "r d -> d r"),
    ("kv_a_proj_with_mqa.bias", "attention/kv_down/bias", "r -> r"),
    ("kv_a_layernorm.weight", "attention/kv_norm/scale", "r -> r"),
    ("kv_b_proj.weight", "attention/kv_up", "(n x) r -> n x r"),
)
_MLA_QUERY: tuple[_Row, ...] = (("q_proj.weight", "attention/query", "(n h) d -> d n h"),)
_MLA_LOW_RANK_QUERY: tuple[_Row, ...] = (
    ("q_a_proj.weight", "attention/query_down/kernel", "r d -> d r"),
    ("q_a_proj.bias", "attention/query_down/bias", "r -> r"),
    ("q_a_layernorm.weight", "attention/query_norm/scale", "r -> r"),
    ("q_b_proj.weight", "attention/query", "(n h) r -> r n h"),
)
_OUTPUT: tuple[_Row, ...] = (
    ("o_proj.weight", "attention/output", "d (n h) -> n h d"),
    ("o_proj.bias", "attention/output_bias", "d -> d"),
)


def language_rules(config: DecoderConfig, names: Names = Names()) -> tuple[Rule, ...]:
    """Where the tensors of a published decoder go.

    Rules whose parameter the model lacks do not apply. The selection bias of ``loss_free`` is state, not a
    parameter: its rule stands for a stack ``routing``, which holds the sparse layers.
    """
    rows: list[_Row] = [
        ("input_layernorm.weight", "attention_norm/scale", "d -> d"),
        ("post_attention_layernorm.weight", "mlp_norm/scale", "d -> d"),
        *((f"self_attn.{row[0]}", *row[1:]) for row in _attention(config)),
        ("mlp.{part}_proj.weight", "mlp/w_in", "part f d -> d part f", _GATE_UP),
        ("mlp.{part}_proj.bias", "mlp/b_in", "part f -> part f", _GATE_UP),
        ("mlp.down_proj.weight", "mlp/w_out", "d f -> f d"),
        ("mlp.down_proj.bias", "mlp/b_out", "d -> d"),
        (names.router + "weight", "moe/router", "e d -> d e"),
        (names.router + "bias", "moe/router_bias", "e -> e"),
        *names.experts,
        (names.shared + "{part}_proj.weight", "moe/shared/w_in", "part f d -> d part f", _GATE_UP),
        (names.shared + "down_proj.weight", "moe/shared/w_out", "d f -> f d"),
        (names.shared.rstrip(".") + "_gate.weight", "moe/shared_gate/kernel", "g d -> d g"),
    ]
    layer = names.base + "layers.{layer}."
    return (
        Rule(names.base + "embed_tokens.weight", "language/embedding", "v d -> v d"),
        Rule(names.head, "language/head/kernel", "v d -> d v"),
        Rule(names.base + "norm.weight", "language/norm/scale", "d -> d"),
        Rule(layer + names.router + "e_score_correction_bias", "{stack}/bias", "layer e -> layer e"),
        *(_rule(layer, row) for row in rows),
    )


def _rule(layer: str, row: _Row) -> Rule:
    source, target, axes, *parts = row
    return Rule(
        layer + source, "language/{stack}/" + target, "layer " + axes.replace("->", "-> layer"), *parts
    )


def _attention(config: DecoderConfig) -> tuple[_Row, ...]:
    if isinstance(config.attention, GQAConfig):
        return (*_GQA, *_OUTPUT)
    query = _MLA_QUERY if config.attention.q_lora_rank is None else _MLA_LOW_RANK_QUERY
    return (*query, *_MLA, *_OUTPUT)


def language_stacks(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The layers each stack of parameters or state holds, for ``rules.plan``."""
    return {"routing": config.sparse_layers, **{run.name: run.layers for run in config.runs}}
