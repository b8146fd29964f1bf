"""Encoders by their configs: what every config says, and what the module that it builds takes and gives.

    module(inputs, valid, routing_state) -> Encoded

``inputs`` are images [B h w c], grey levels or normalised floats, texts [B T], clips [B f h w c], or inputs
of other kinds [B ...]. ``valid`` is bool[B]; for texts, and for inputs that vary in length along their first
axis, it is bool[B T], the steps that are there. What is not valid takes no experts. ``routing_state`` is that
of the sparse layers. The module returns ``Encoded``: the tokens that a language model would see, and the
input as one vector where the encoder has one.
"""

from __future__ import annotations

from typing import Annotated, Protocol, runtime_checkable

import flax.linen as nn
from jax.typing import DTypeLike

from vl_jax.encoders.deformable_front import DeformableFrontConfig
from vl_jax.encoders.high_resolution import HighResolutionConfig
from vl_jax.encoders.hybrid import HybridConfig
from vl_jax.encoders.language.bert import BertConfig
from vl_jax.encoders.language.relative import RelativeTextConfig
from vl_jax.encoders.language.transformer_xl import TransformerXLConfig
from vl_jax.encoders.resnet import ResNetConfig
from vl_jax.encoders.sam import SAMConfig
from vl_jax.encoders.series.lstm import LSTMConfig
from vl_jax.encoders.series.tcn import TCNConfig
from vl_jax.encoders.sound.spectrogram import SpectrogramConfig
from vl_jax.encoders.sound.wav2vec2 import Wav2Vec2Config
from vl_jax.encoders.swin import SwinConfig
from vl_jax.encoders.swin_hybrid import SwinHybridConfig
from vl_jax.encoders.text import TextEncoderConfig
from vl_jax.encoders.video.resnet3d import VideoResNetConfig
from vl_jax.encoders.video.videomae import VideoMAEConfig
from vl_jax.encoders.vit import ViTConfig
from vl_jax.moe.stacks import Stack
from vl_jax.schema import Open


@runtime_checkable
class EncoderConfig(Protocol):
    """The config of an encoder, a frozen dataclass.

    One of texts that reads padding like any token says so by a field ``sees_padding``. One of sounds, series
    or clips, whose rows differ in length, says so by ``varies = True`` as a property of the class: then
    ``input_shape`` begins with the most steps, and ``Encoded.mask`` says which tokens are there. One that
    reads another input than float32 has a property ``input_dtype``, such as "uint8" for grey levels.
    ``isinstance`` reads all properties, so it raises where ``grid`` does.
    """

    @property
    def output_dim(self) -> int:
        """Width of a token."""
        ...

    @property
    def num_tokens(self) -> int:
        """Tokens of one input; of a text, the most there can be."""
        ...

    @property
    def grid(self) -> int:
        """Tokens on the side of an image.

        Raises:
          ValueError: they form no square.
        """
        ...

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input: height, width and channels of an image, length of a text."""
        ...

    @property
    def stack(self) -> Stack | None:
        """The sparse layers, by paths of modules from that of the encoder on; None without any."""
        ...

    def build(self, dtype: DTypeLike, *, remat: bool = False) -> nn.Module:
        """The module.

        Args:
          dtype: of activations.
          remat: keep only the inputs of layers for the backward pass.
        """
        ...


# What a class of an encoder must have.
NEEDS = ("output_dim", "num_tokens", "grid", "input_shape", "stack", "build")

AnyEncoder = Annotated[
    ViTConfig
    | SAMConfig
    | ResNetConfig
    | HybridConfig
    | HighResolutionConfig
    | SwinConfig
    | SwinHybridConfig
    | DeformableFrontConfig
    | VideoMAEConfig
    | VideoResNetConfig
    | TextEncoderConfig
    | BertConfig
    | TransformerXLConfig
    | RelativeTextConfig
    | Wav2Vec2Config
    | LSTMConfig
    | TCNConfig
    | SpectrogramConfig
    | EncoderConfig,
    Open("encoder", NEEDS),
]
