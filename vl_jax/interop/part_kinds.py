"""The kinds of published encoders that can begin a part of a model, and what of them has to agree with it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from vl_jax.encoders.language.bert import BertConfig
from vl_jax.encoders.language.transformer_xl import TransformerXLConfig
from vl_jax.encoders.resnet import ResNetConfig
from vl_jax.encoders.sound.wav2vec2 import Wav2Vec2Config
from vl_jax.encoders.swin import SwinConfig
from vl_jax.encoders.video.resnet3d import VideoResNetConfig
from vl_jax.encoders.video.videomae import VideoMAEConfig
from vl_jax.encoders.vit import ViTConfig
from vl_jax.interop import conv, vision
from vl_jax.interop.encoders import bert, sound, swin, transformer_xl, video
from vl_jax.interop.rules import STACK, Rule

Fields = Mapping[str, Any]
Stacks = Mapping[str, tuple[int | str, ...]]
RulesOf = Callable[[Any, str, Fields, Mapping[str, Any]], tuple[tuple[Rule, ...], Stacks]]


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of part: who publishes it, how it is read, and which of its fields have to agree."""

    config: type  # ours
    names: tuple[str, ...]  # model types, or architectures of torchvision
    read: Callable[[Fields], Any]  # the published config as one of ours
    rules: RulesOf  # by our config, path of the part, published config and weights: the rules, and the stacks
    same: tuple[str, ...]  # fields that are alike
    first: tuple[str, ...] = ()  # fields of ours that are the beginning of theirs
    most: tuple[str, ...] = ()  # fields of which ours may have no more
    # Their table of positions as ours, by both configs; None: it is read like any other tensor.
    positions: Callable[[np.ndarray, Any, Any], np.ndarray] | None = None

    def differences(self, ours: Any, theirs: Any) -> Iterator[tuple[str, Any, Any]]:
        """(field, ours, theirs) of what must agree and does not."""
        for name in (*self.same, *self.first, *self.most):
            mine, given = getattr(ours, name), getattr(theirs, name)
            if (
                (name in self.same and mine != given)
                or (name in self.first and mine != given[: len(mine)])
                or (name in self.most and mine > given)
            ):
                yield name, mine, given


def name_of(fields: Fields) -> str:
    """What a published config says that it is."""
    return str(fields.get("model_type") or fields.get("architecture"))


def find_prefix(keys: Mapping[str, Any], anchor: str) -> str:
    """What comes before the names of an encoder one of whose tensors is called ``anchor``.

    Raises:
      ValueError: none or several are.
    """
    found = [key.removesuffix(anchor) for key in keys if key == anchor or key.endswith(f".{anchor}")]
    if len(found) != 1:
        raise ValueError(f"{len(found)} tensors are called {anchor!r}; expected one")
    return found[0]


def _resnet(config: Any, path: str, _: Fields, keys: Mapping[str, Any]) -> tuple[tuple[Rule, ...], Stacks]:
    source = find_prefix(keys, "embedder.embedder.convolution.weight")
    return conv.resnet_rules(config, source, f"params/{path}/", f"batch_stats/{path}/"), {}


def _vit(config: Any, path: str, fields: Fields, keys: Mapping[str, Any]) -> tuple[tuple[Rule, ...], Stacks]:
    kind, target = name_of(fields), f"params/{path}/"
    table = vision.vision_rules(kind, source=vision.find_prefix(keys, kind), target=target)
    blocks, stack = f"{target}blocks/", f"{target}{STACK}/"
    table = tuple(dataclasses.replace(r, target=r.target.replace(blocks, stack, 1)) for r in table)
    return table, {run.name: run.layers for run in config.block.runs}


def _swin(config: Any, path: str, fields: Fields, keys: Mapping[str, Any]) -> tuple[tuple[Rule, ...], Stacks]:
    names = swin.names_of(fields)
    source = find_prefix(keys, f"{names.stem}.weight")
    return names.rules(config, source, f"params/{path}/"), names.stacks(config)


def _videomae(config: Any, path: str, _: Fields, keys: Mapping[str, Any]) -> tuple[tuple[Rule, ...], Stacks]:
    source = find_prefix(keys, "embeddings.patch_embeddings.projection.weight")
    return video.videomae_rules(source, f"params/{path}/"), {}


def _r3d(config: Any, path: str, _: Fields, keys: Mapping[str, Any]) -> tuple[tuple[Rule, ...], Stacks]:
    source = find_prefix(keys, "stem.0.weight")
    return video.r3d_rules(config, source, f"params/{path}/", f"batch_stats/{path}/"), {}


def _bert(config: Any, path: str, _: Fields, keys: Mapping[str, Any]) -> tuple[tuple[Rule, ...], Stacks]:
    source = find_prefix(keys, "embeddings.word_embeddings.weight")
    return bert.bert_rules(source=source, target=f"params/{path}/"), bert.bert_stacks(config)


def _transfo_xl(
    config: Any, path: str, _: Fields, keys: Mapping[str, Any]
) -> tuple[tuple[Rule, ...], Stacks]:
    source = find_prefix(keys, "word_emb.emb_layers.0.weight")
    return transformer_xl.transformer_xl_rules(config, keys, source=source, target=f"params/{path}/"), {}


def _wav2vec2(config: Any, path: str, _: Fields, keys: Mapping[str, Any]) -> tuple[tuple[Rule, ...], Stacks]:
    source = find_prefix(keys, "feature_projection.projection.weight")
    return sound.wav2vec2_rules(keys, source=source, target=f"params/{path}/"), {}


def _resized(table: np.ndarray, theirs: ViTConfig, ours: ViTConfig) -> np.ndarray:
    """The positions of a grid as those of another one, by bicubic interpolation; f32[T D].

    Raises:
      ValueError: the table is not that of its own config.
    """
    table = np.asarray(table, np.float32).reshape(-1, table.shape[-1])
    if table.shape != (theirs.length, theirs.embed_dim):
        expected = (theirs.length, theirs.embed_dim)
        raise ValueError(f"config.init_parts: positions have shape {table.shape}, expected {expected}")
    first, cells = table[: int(theirs.class_token)], table[int(theirs.class_token) :]
    if theirs.grid_shape != ours.grid_shape:
        grid = cells.reshape(*theirs.grid_shape, -1)
        resized = jax.image.resize(grid, (*ours.grid_shape, grid.shape[-1]), "bicubic", antialias=False)
        cells = np.asarray(resized).reshape(math.prod(ours.grid_shape), -1)
    return np.concatenate([first, cells]) if ours.class_token else cells


def _first(table: np.ndarray, _: BertConfig, ours: BertConfig) -> np.ndarray:
    """The first positions of a text; f32[T D]."""
    return np.asarray(table, np.float32)[: ours.max_length]


def _all_but(config: type, *free: str) -> tuple[str, ...]:
    """The fields of a config without those on which no tensor depends."""
    return tuple(field.name for field in dataclasses.fields(config) if field.name not in free)


_BLOCKS = ("embed_dim", "mlp_dim", "num_heads", "activation", "norm_epsilon", "qkv_bias")
KINDS = (
    Kind(
        ResNetConfig,
        ("resnet",),
        conv.read_resnet,
        _resnet,
        ("stem_dim", "block", "bottleneck_stride", "first_stage_stride", "activation"),
        first=("stage_dims", "stage_blocks"),
    ),
    Kind(
        ViTConfig,
        tuple(vision.TABLES),
        vision.read_vision,
        _vit,
        (*_BLOCKS, "pre_norm"),
        most=("num_layers", "class_token"),
        positions=_resized,
    ),
    Kind(
        SwinConfig,
        ("swin", *swin.TORCHVISION),
        swin.read_swin,
        _swin,
        ("embed_dim", "window", "mlp_ratio", "activation", "norm_epsilon", "qkv_bias"),
        first=("stage_blocks", "num_heads"),
    ),
    Kind(
        VideoMAEConfig,
        ("videomae",),
        lambda fields: video.read_videomae(fields).encoder,
        _videomae,
        (*_BLOCKS, "patch_size", "tubelet", "num_channels", "final_norm", "num_layers"),
    ),
    Kind(
        VideoResNetConfig,
        tuple(video.ARCHITECTURES),
        video.read_r3d,
        _r3d,
        ("stem_dim", "num_channels"),
        first=("stage_dims", "stage_blocks"),
    ),
    Kind(
        BertConfig,
        ("bert",),
        bert.read_bert,
        _bert,
        _all_but(BertConfig, "max_length", "causal", "pooler", "moe", "sparse_layers"),
        most=("max_length",),
        positions=_first,
    ),
    Kind(
        TransformerXLConfig,
        ("transfo-xl",),
        transformer_xl.read_transformer_xl,
        _transfo_xl,
        _all_but(TransformerXLConfig, "max_length", "memory", "farthest", "same_length", "remember_zeros"),
    ),
    Kind(
        Wav2Vec2Config,
        ("wav2vec2",),
        sound.read_wav2vec2,
        _wav2vec2,
        _all_but(Wav2Vec2Config, "max_samples", "rate", "normalize"),
    ),
)
KIND_OF = {kind.config: kind for kind in KINDS}
NAMES = tuple(name for kind in KINDS for name in kind.names)
