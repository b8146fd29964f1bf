"""Published Switch Transformers: their configs as ours, and where each of their tensors goes.

What a published ``config.json`` leaves out takes the default of the official class; an explicit null is a
value of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vl_jax.interop.rules import Rule
from vl_jax.interop.vision import ACTIVATIONS
from vl_jax.kernels.activation import FUNCTIONS, Activation
from vl_jax.language.encoder_decoder import EncoderDecoderConfig, StackConfig
from vl_jax.language.text_to_text import TextToTextConfig
from vl_jax.moe.config import BalanceConfig, CapacityConfig, SharedExpertsConfig
from vl_jax.moe.routing import MoEConfig

Fields = Mapping[str, Any]

DEFAULTS: Fields = {
    "vocab_size": 32_128,
    "d_model": 768,
    "d_kv": 64,
    "d_ff": 2048,
    "expert_capacity": 64,
    "num_layers": 12,
    "num_sparse_encoder_layers": 3,
    "num_decoder_layers": 12,
    "num_sparse_decoder_layers": 3,
    "num_heads": 12,
    "num_experts": 8,
    "router_bias": False,
    "router_dtype": "float32",
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "router_z_loss_coef": 0.001,
    "router_aux_loss_coef": 0.001,
    "dense_act_fn": "relu",
    "pad_token_id": 0,
    "decoder_start_token_id": None,
    "tie_word_embeddings": True,
}
# Copies of a tied table that older files hold, and the one table that an untied model does not read.
IGNORED = (r"shared\.weight", r"lm_head\.weight", r"(encoder|decoder)\.embed_tokens\.weight")


@dataclass(frozen=True)
class SwitchConfig:
    """A model, and how its published class trains it.

    Its router losses are those of ``balance.sequence_losses``, of a stack at a time.
    """

    model: EncoderDecoderConfig
    moe: MoEConfig
    balance_weight: float
    z_weight: float
    penalized: tuple[str, ...]  # the stacks whose router losses count
    start_id: int  # the first token that a decoder reads
    pad_id: int


def read_encoder_decoder(config: Fields) -> SwitchConfig:
    """Our configuration of a published model.

    The class uses neither ``feed_forward_proj`` nor ``router_ignore_padding_tokens``, whatever they say. Its
    dropout and the jitter of its routers, which act in training only, are left out here.

    Raises:
      ValueError: the model type is not known, or an option is not supported.
    """
    c = {**DEFAULTS, **config}
    if c.get("model_type") != "switch_transformers":
        raise ValueError(f"model_type={c.get('model_type')!r}: known is switch_transformers")
    if c["router_dtype"] != "float32":
        raise ValueError(f"router_dtype={c['router_dtype']!r}: only float32 is supported")
    known = [name for name, ours in ACTIVATIONS.items() if ours in FUNCTIONS]
    if c["dense_act_fn"] not in known:
        raise ValueError(f"dense_act_fn={c['dense_act_fn']!r}: known are {', '.join(known)}")
    activation = Activation(ACTIVATIONS[c["dense_act_fn"]], gated=False)  # pyright: ignore[reportArgumentType]
    deep = c["num_decoder_layers"]  # null: as many as the encoder has
    layers = {"encoder": c["num_layers"], "decoder": c["num_layers"] if deep is None else deep}
    steps = {side: _sparse_step(c, side, count) for side, count in layers.items()}
    model = EncoderDecoderConfig(
        vocab_size=c["vocab_size"],
        embed_dim=c["d_model"],
        mlp_dim=c["d_ff"],
        num_heads=c["num_heads"],
        head_dim=c["d_kv"],
        encoder=_stack(layers["encoder"], steps["encoder"]),
        decoder=_stack(layers["decoder"], steps["decoder"]),
        num_buckets=c["relative_attention_num_buckets"],
        max_distance=c["relative_attention_max_distance"],
        activation=activation,
        norm_epsilon=c["layer_norm_epsilon"],
        tie_embeddings=c["tie_word_embeddings"],
    )
    moe = MoEConfig(
        num_experts=c["num_experts"],
        top_k=1,
        expert_dim=c["d_ff"],
        shared=SharedExpertsConfig(num=0),
        router_bias=c["router_bias"],
        activation=activation,
        balance=BalanceConfig(weight=0.0),
        limit=CapacityConfig(slots=c["expert_capacity"]),
    )
    return SwitchConfig(
        model,
        moe,
        balance_weight=c["router_aux_loss_coef"],
        z_weight=c["router_z_loss_coef"],
        # The class counts none where every layer, or none, is sparse.
        penalized=tuple(side for side, step in steps.items() if step > 1),
        start_id=c["pad_token_id"] if c["decoder_start_token_id"] is None else c["decoder_start_token_id"],
        pad_id=c["pad_token_id"],
    )


def read_text_to_text(config: Fields) -> TextToTextConfig:
    """A published model as one that is trained on rows and asked: ``read_encoder_decoder``, but padding takes
    no experts.

    Raises:
      ValueError: see there.
    """
    found = read_encoder_decoder(config)
    network = dataclasses.replace(found.model, route_padding=False)
    return TextToTextConfig(network, found.moe, start_id=found.start_id)


def _sparse_step(c: Fields, side: str, layers: int) -> int:
    """Every how many layers one is sparse. A step that is written down wins over the number of layers.

    The class meant a number of 0 to make all layers dense, but makes one sparse.
    """
    sparse = c[f"num_sparse_{side}_layers"]
    step = c.get(f"{side}_sparse_step")
    return (layers // sparse if sparse > 0 else layers) if step is None else step


def _stack(layers: int, step: int) -> StackConfig:
    return StackConfig(layers, tuple(i for i in range(layers) if step > 0 and i % step == 1 % step))


# (name below a layer of the source, path below a layer of ours, axes without the layer[, parts])
_Row = tuple[Any, ...]


def _attention(name: str, target: str) -> tuple[_Row, ...]:
    return (
        (f"{name}.q.weight", f"{target}/query", "(n h) d -> d n h"),
        (f"{name}.k.weight", f"{target}/key", "(n h) d -> d n h"),
        (f"{name}.v.weight", f"{target}/value", "(n h) d -> d n h"),
        (f"{name}.o.weight", f"{target}/output", "d (n h) -> n h d"),
    )


def encoder_decoder_rules() -> tuple[Rule, ...]:
    """Where the tensors of a published model go. Rules whose parameter the model lacks do not apply."""
    ends = (
        Rule("shared.weight", "embedding", "v d -> v d"),
        Rule("encoder.embed_tokens.weight", "source_embedding", "v d -> v d"),
        Rule("decoder.embed_tokens.weight", "target_embedding", "v d -> v d"),
        Rule("lm_head.weight", "head/kernel", "v d -> d v"),
    )
    cross = (
        *_attention("1.EncDecAttention", "cross_attention"),
        ("1.layer_norm.weight", "cross_norm/scale", "d -> d"),
    )
    return (*ends, *_stack_rules("encoder", 1), *_stack_rules("decoder", 2, cross))


def _stack_rules(side: str, last: int, cross: tuple[_Row, ...] = ()) -> tuple[Rule, ...]:
    """The rules of one stack; in its layers, the feed-forward part has the number ``last``."""
    rows: tuple[_Row, ...] = (
        *_attention("0.SelfAttention", "attention"),
        ("0.layer_norm.weight", "attention_norm/scale", "d -> d"),
        *cross,
        (f"{last}.layer_norm.weight", "mlp_norm/scale", "d -> d"),
        (f"{last}.mlp.{{part}}.weight", "mlp/w_in", "part f d -> d part f", ("wi",)),
        (f"{last}.mlp.wo.weight", "mlp/w_out", "d f -> f d"),
        (f"{last}.mlp.router.classifier.weight", "moe/router", "e d -> d e"),
        (f"{last}.mlp.router.classifier.bias", "moe/router_bias", "e -> e"),
        (
            f"{last}.mlp.experts.expert_{{expert}}.{{part}}.weight",
            "moe/w_in",
            "expert part f d -> expert d part f",
            ("wi",),
        ),
        (f"{last}.mlp.experts.expert_{{expert}}.wo.weight", "moe/w_out", "expert d f -> expert f d"),
    )
    bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return (
        Rule(bias, f"{side}/position_bias", "x n -> x n"),
        Rule(f"{side}.final_layer_norm.weight", f"{side}/norm/scale", "d -> d"),
        *(_rule(side, row) for row in rows),
    )


def _rule(side: str, row: _Row) -> Rule:
    source, target, axes, *parts = row
    layered = "layer " + axes.replace("->", "-> layer")
    return Rule(f"{side}.block.{{layer}}.layer.{source}", f"{side}/{{stack}}/{target}", layered, *parts)


def encoder_decoder_stacks(config: EncoderDecoderConfig) -> dict[str, tuple[int, ...]]:
    """The layers each stack of parameters holds, for ``rules.plan``; a name means the same in both stacks."""
    return {run.name: run.layers for stack in (config.encoder, config.decoder) for run in stack.runs}
