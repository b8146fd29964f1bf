"""The kinds of published encoders that can begin a part of a model, and what of them has to agree with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from vl_jax.encoders.resnet import ResNetConfig
from vl_jax.encoders.swin import SwinConfig
from vl_jax.encoders.video.resnet3d import VideoResNetConfig
from vl_jax.encoders.video.videomae import VideoMAEConfig
from vl_jax.encoders.vit import ViTConfig
from vl_jax.interop import conv, vision
from vl_jax.interop.encoders import swin, video
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
)
KIND_OF = {kind.config: kind for kind in KINDS}
NAMES = tuple(name for kind in KINDS for name in kind.names)
