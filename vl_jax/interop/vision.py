"""Published image encoders and image-text pairs: their configs as ours, and where each tensor goes.

One vision transformer and one text encoder serve them all. What a published ``config.json`` leaves out takes
the default of the official class; an explicit null is a value of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from vl_jax.batch import TILES, TOKENS
from vl_jax.encoders.text import TextEncoderConfig
from vl_jax.encoders.vit import OUTPUTS, ViTConfig
from vl_jax.heads.pairs import Pairs
from vl_jax.interop.rules import Rule
from vl_jax.joint import JointConfig, Tower
from vl_jax.kernels.activation import FUNCTIONS

Fields = Mapping[str, Any]

# Published name of a non-linearity to ours.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
    "linear": "none",
}
# How CLIP's images are normalised; all others use 0.5.
CLIP_PIXELS: dict[str, Any] = {
    "pixel_mean": (0.48145466, 0.4578275, 0.40821073),
    "pixel_std": (0.26862954, 0.26130258, 0.27577711),
}
# What is no parameter of ours: numbers 0, 1, 2, ... in older checkpoints, and DeepSeek-VL2's unused head.
IGNORED = (r"(.*\.)?position_ids", r"vision\.attn_pool\..*")

# Model type to the defaults of the official config class.
_ENCODER = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
}
_TEXT = {"num_hidden_layers": 12, "eos_token_id": 49_407}
DEFAULTS: dict[str, Fields] = {
    "siglip_vision_model": {
        **_ENCODER,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "vision_use_head": True,
    },
    "clip_vision_model": {
        **_ENCODER,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    "vit": {
        **_ENCODER,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "qkv_bias": True,
        "pooler_output_size": None,
        "pooler_act": "tanh",
    },
    "vision": {  # of DeepSeek-VL2
        "image_size": 384,
        "patch_size": 16,
        "width": 1024,
        "layers": 24,
        "heads": 16,
        "mlp_ratio": 4,
        "ignore_head": True,
        "class_token": False,
    },
    "siglip_text_model": {
        **_TEXT,
        "vocab_size": 32_000,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "max_position_embeddings": 64,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "projection_size": None,
    },
    "clip_text_model": {
        **_TEXT,
        "vocab_size": 49_408,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    "siglip": {},
    "clip": {"projection_dim": 512, "logit_scale_init_value": 2.6592},
}
CONTRASTIVE = ("siglip", "clip")  # pairs of an image and a text encoder


def _with_defaults(config: Fields, known: Iterable[str], model_type: str = "") -> Fields:
    """The fields of a published config, those it leaves out included.

    Raises:
      ValueError: the model type is not among the known ones.
    """
    kind = model_type or str(config.get("model_type"))
    if kind not in known:
        raise ValueError(f"model_type={kind!r}: known are {', '.join(known)}")
    return {**DEFAULTS[kind], **config, "model_type": kind}


def read_vision(config: Fields) -> ViTConfig:
    """Our configuration of a published image encoder.

    Raises:
      ValueError: the model type is not known, or an option is not supported.
    """
    c = _with_defaults(config, ("siglip_vision_model", "clip_vision_model", "vit", "vision"))
    if c["model_type"] == "vision":
        return _deepseek_vl2(c)
    common: dict[str, Any] = {
        "image_size": _sides(c["image_size"]),
        "patch_size": _sides(c["patch_size"]),
        "num_channels": c["num_channels"],
        "embed_dim": c["hidden_size"],
        "mlp_dim": c["intermediate_size"],
        "num_layers": c["num_hidden_layers"],
        "num_heads": c["num_attention_heads"],
        "activation": _activation(c, "hidden_act", FUNCTIONS),
        "norm_epsilon": c["layer_norm_eps"],
    }
    if c["model_type"] == "siglip_vision_model":
        return ViTConfig(**common, pooling="attention" if c["vision_use_head"] else "none")
    if c["model_type"] == "clip_vision_model":
        options: dict[str, Any] = {"stem_bias": False, "pre_norm": True, "final_norm": "pooled"}
        return ViTConfig(**common, **options, **CLIP_PIXELS, class_token=True, pooling="class")
    return ViTConfig(
        **common,
        qkv_bias=c["qkv_bias"],
        class_token=True,
        pooling="class",
        projection_dim=c["pooler_output_size"] or c["hidden_size"],
        projection_bias=True,
        projection_activation=_activation(c, "pooler_act", OUTPUTS),
    )


def _deepseek_vl2(c: Fields) -> ViTConfig:
    for option, allowed in (("ignore_head", True), ("class_token", False)):
        if c[option] != allowed:
            raise ValueError(f"{option}={c[option]!r}: expected {allowed}, as in all of DeepSeek-VL2")
    return ViTConfig(
        image_size=c["image_size"],
        patch_size=c["patch_size"],
        embed_dim=c["width"],
        mlp_dim=int(c["width"] * c["mlp_ratio"]),
        num_layers=c["layers"],
        num_heads=c["heads"],
    )


def read_contrastive(config: Fields) -> JointConfig:
    """Our configuration of a published pair of encoders: two towers, and a head that compares them.

    Raises:
      ValueError: the model type is not known, an option is not supported, or the encoders do not match.
    """
    c = _with_defaults(config, CONTRASTIVE)
    kind = c["model_type"]
    vision = _part(c, "vision_config", f"{kind}_vision_model")
    text = _part(c, "text_config", f"{kind}_text_model")
    image, words = read_vision(vision), _read_text(text)
    if kind == "siglip":
        if image.pooling == "none":
            raise ValueError("vision_config.vision_use_head=False: without its head an image has no vector")
        head = Pairs(dim=None, initial_scale=math.log(10), bias=True)
    else:
        image, words = (
            dataclasses.replace(part, projection_dim=c["projection_dim"]) for part in (image, words)
        )
        head = Pairs(dim=None, initial_scale=c["logit_scale_init_value"])
    return JointConfig(towers=(Tower("image", image, TILES), Tower("text", words, TOKENS)), heads=(head,))


def _part(c: Fields, name: str, kind: str) -> Fields:
    """The config of one encoder of a pair. The old ``<name>_dict``, where there is one, wins as a whole."""
    part = _with_defaults(c.get(name) or {}, (kind,), kind)
    old = c.get(f"{name}_dict")
    return part if old is None else {**part, **_with_defaults(old, (kind,), kind)}


def _read_text(c: Fields) -> TextEncoderConfig:
    common: dict[str, Any] = {
        "vocab_size": c["vocab_size"],
        "max_length": c["max_position_embeddings"],
        "embed_dim": c["hidden_size"],
        "mlp_dim": c["intermediate_size"],
        "num_layers": c["num_hidden_layers"],
        "num_heads": c["num_attention_heads"],
        "activation": _activation(c, "hidden_act", FUNCTIONS),
        "norm_epsilon": c["layer_norm_eps"],
    }
    if c["model_type"] == "siglip_text_model":
        width = c["projection_size"] or c["hidden_size"]
        return TextEncoderConfig(
            **common,
            causal=False,
            pooling="last",
            sees_padding=True,
            projection_dim=width,
            projection_bias=True,
        )
    # Configs from before the end-of-text token was written down say 2, and mean the largest id.
    end = c["eos_token_id"]
    pooling: Any = "largest_id" if end == 2 else "first_end"
    return TextEncoderConfig(**common, pooling=pooling, end_id=end, projection_dim=0)


def _sides(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _activation(c: Fields, name: str, allowed: Iterable[str]) -> Any:
    known = [published for published, ours in ACTIVATIONS.items() if ours in allowed]
    if c[name] not in known:
        raise ValueError(f"{name}={c[name]!r}: known are {', '.join(known)}")
    return ACTIVATIONS[c[name]]


# (name of a tensor in the source, path of a parameter of ours, axes)
_Row = tuple[str, str, str]


def _norm(source: str, target: str) -> tuple[_Row, ...]:
    return ((f"{source}.weight", f"{target}/scale", "d -> d"), (f"{source}.bias", f"{target}/bias", "d -> d"))


def _linear(source: str, target: str) -> tuple[_Row, ...]:
    return (
        (f"{source}.weight", f"{target}/kernel", "f d -> d f"),
        (f"{source}.bias", f"{target}/bias", "f -> f"),
    )


def _patches(source: str) -> tuple[_Row, ...]:
    return (
        (f"{source}.weight", "stem/kernel", "d c u v -> u v c d"),
        (f"{source}.bias", "stem/bias", "d -> d"),
    )


def _separate(source: str, output: str) -> tuple[_Row, ...]:
    """Attention whose query, key and value are tensors of their own."""
    return (
        (f"{source}.weight", "attention/qkv", "part (n h) d -> d part n h"),
        (f"{source}.bias", "attention/qkv_bias", "part (n h) -> part n h"),
        *_output(output, "attention"),
    )


def _fused(source: str, output: str, target: str) -> tuple[_Row, ...]:
    """Attention whose query, key and value are one tensor; ``source`` comes before weight and bias."""
    return (
        (f"{source}weight", f"{target}/qkv", "(x n h) d -> d x n h"),
        (f"{source}bias", f"{target}/qkv_bias", "(x n h) -> x n h"),
        *_output(output, target),
    )


def _output(source: str, target: str) -> tuple[_Row, ...]:
    return (
        (f"{source}.weight", f"{target}/project", "d (n h) -> n h d"),
        (f"{source}.bias", f"{target}/project_bias", "d -> d"),
    )


@dataclasses.dataclass(frozen=True)
class Table:
    """Where the tensors of one kind of encoder go. Rows whose parameter an encoder lacks do not apply."""

    outer: tuple[_Row, ...]  # the first one names a tensor that every checkpoint has
    layer: str  # comes before the names of a layer
    inner: tuple[_Row, ...]
    parts: tuple[str, str, str] = ("q", "k", "v")

    def rules(self, source: str, target: str) -> tuple[Rule, ...]:
        """The rules, with prefixes before the names of both sides."""
        outer = [Rule(source + name, target + path, axes) for name, path, axes in self.outer]
        inner = [
            Rule(
                f"{source}{self.layer}{name}",
                f"{target}blocks/{path}",
                f"layer {axes.replace('->', '-> layer')}",
                self.parts if "{part}" in name else (),
            )
            for name, path, axes in self.inner
        ]
        return (*outer, *inner)


_BLOCK = (
    *_norm("layer_norm1", "norm1"),
    *_norm("layer_norm2", "norm2"),
    *_separate("self_attn.{part}_proj", "self_attn.out_proj"),
    *_linear("mlp.fc1", "fc1"),
    *_linear("mlp.fc2", "fc2"),
)
_POSITIONS: _Row = ("embeddings.position_embedding.weight", "positions", "t d -> t d")
_SIGLIP = Table(
    (
        *_patches("embeddings.patch_embedding"),
        _POSITIONS,
        *_norm("post_layernorm", "norm"),
        ("head.probe", "pooler/probe", "1 1 d -> d"),
        *_fused("head.attention.in_proj_", "head.attention.out_proj", "pooler/attention"),
        *_norm("head.layernorm", "pooler/norm"),
        *_linear("head.mlp.fc1", "pooler/fc1"),
        *_linear("head.mlp.fc2", "pooler/fc2"),
    ),
    "encoder.layers.{layer}.",
    _BLOCK,
)
_CLIP = Table(
    (
        *_patches("embeddings.patch_embedding"),
        ("embeddings.class_embedding", "class_token", "d -> d"),
        _POSITIONS,
        *_norm("pre_layrnorm", "pre_norm"),  # so spelt
        *_norm("post_layernorm", "norm"),
    ),
    "encoder.layers.{layer}.",
    _BLOCK,
)
_VIT = Table(
    (
        *_patches("embeddings.patch_embeddings.projection"),
        ("embeddings.cls_token", "class_token", "1 1 d -> d"),
        ("embeddings.position_embeddings", "positions", "1 t d -> t d"),
        *_norm("layernorm", "norm"),
        *_linear("pooler.dense", "projection"),
    ),
    "encoder.layer.{layer}.",
    (
        *_norm("layernorm_before", "norm1"),
        *_norm("layernorm_after", "norm2"),
        *_separate("attention.attention.{part}", "attention.output.dense"),
        *_linear("intermediate.dense", "fc1"),
        *_linear("output.dense", "fc2"),
    ),
    ("query", "key", "value"),
)
_TIMM = Table(
    (
        *_patches("patch_embed.proj"),
        ("pos_embed", "positions", "1 t d -> t d"),
        *_norm("norm", "norm"),
    ),
    "blocks.{layer}.",
    (
        *_norm("norm1", "norm1"),
        *_norm("norm2", "norm2"),
        *_fused("attn.qkv.", "attn.proj", "attention"),
        *_linear("mlp.fc1", "fc1"),
        *_linear("mlp.fc2", "fc2"),
    ),
)
_TEXT_TABLE = Table(
    (
        ("embeddings.token_embedding.weight", "embedding", "v d -> v d"),
        _POSITIONS,
        *_norm("final_layer_norm", "norm"),
        *_linear("head", "projection"),
    ),
    "encoder.layers.{layer}.",
    _BLOCK,
)
TABLES = {
    "siglip_vision_model": _SIGLIP,
    "clip_vision_model": _CLIP,
    "vit": _VIT,
    "vision": _TIMM,
}


def vision_rules(model_type: str, *, source: str = "", target: str = "") -> tuple[Rule, ...]:
    """Where the tensors of a published image encoder go.

    Args:
      source: comes before every name in the checkpoint, e.g. what ``find_prefix`` gives.
      target: comes before every path of ours, e.g. ``encoder/``.
    """
    return TABLES[model_type].rules(source, target)


def contrastive_rules(model_type: str) -> tuple[Rule, ...]:
    """Where the tensors of a published pair of encoders go."""
    text = _TEXT_TABLE.rules("text_model.", "text/")
    vision = vision_rules(f"{model_type}_vision_model", source="vision_model.", target="image/")
    if model_type == "siglip":
        ends = (Rule("logit_scale", "pairs/scale", "1 ->"), Rule("logit_bias", "pairs/bias", "1 ->"))
        return (*text, *vision, *ends)
    text = tuple(rule for rule in text if not rule.source.startswith("text_model.head."))
    ends = (
        Rule("text_projection.weight", "text/projection/kernel", "f d -> d f"),
        Rule("visual_projection.weight", "image/projection/kernel", "f d -> d f"),
        Rule("logit_scale", "pairs/scale", "->"),
    )
    return (*text, *vision, *ends)


def find_prefix(keys: Iterable[str], model_type: str) -> str:
    """What comes before the names of an image encoder in a checkpoint, e.g. ``vision_tower.vision_model.``.

    Raises:
      ValueError: no such encoder is there, or several are.
    """
    anchor = TABLES[model_type].outer[0][0]
    found = [k.removesuffix(anchor) for k in keys if k == anchor or k.endswith(f".{anchor}")]
    if len(found) != 1:
        raise ValueError(f"{len(found)} tensors are called {anchor!r}; expected one {model_type} encoder")
    return found[0]
