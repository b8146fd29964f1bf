"""Image-text pairs: two encoders into one space, where an image is near the text that belongs to it.

    image -> ViT         -> unit vector --.
                                           +--> logits[i, t] = exp(scale) * <image i, text t> (+ bias)
    text  -> TextEncoder -> unit vector --'

CLIP (arXiv 2103.00020) trains the logits as two classifications, SigLIP (2303.15343) as one yes or no for
every pair.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt8

from vl_jax import losses
from vl_jax.encoders.text import TextEncoder, TextEncoderConfig
from vl_jax.encoders.transformer import Encoded
from vl_jax.encoders.vit import ViT, ViTConfig
from vl_jax.nn.layers import named
from vl_jax.params import Leaf


@dataclasses.dataclass(frozen=True)
class ContrastiveConfig:
    """A pair of encoders and the loss they are trained with. Defaults are CLIP-ViT-B/32."""

    vision: ViTConfig = ViTConfig(
        image_size=224,
        patch_size=32,
        embed_dim=768,
        mlp_dim=3072,
        num_layers=12,
        num_heads=12,
        activation="quick_gelu",
        norm_epsilon=1e-5,
        stem_bias=False,
        class_token=True,
        pre_norm=True,
        final_norm="pooled",
        pooling="class",
        projection_dim=512,
        pixel_mean=(0.48145466, 0.4578275, 0.40821073),
        pixel_std=(0.26862954, 0.26130258, 0.27577711),
    )
    text: TextEncoderConfig = TextEncoderConfig()
    loss: Literal["softmax", "sigmoid"] = "softmax"
    initial_scale: float = math.log(1 / 0.07)  # of logit_scale; SigLIP starts at log 10
    initial_bias: float = -10.0  # of logit_bias, which the sigmoid loss has

    def __post_init__(self):
        if self.vision.pooling == "none":
            raise ValueError("vision.pooling='none' gives no vector; expected 'class' or 'attention'")
        if self.vision.pooled_dim != self.text.pooled_dim:
            raise ValueError(
                f"image vectors have {self.vision.pooled_dim} features, text vectors {self.text.pooled_dim}: "
                "must be equal"
            )


@struct.dataclass
class ContrastiveOutput:
    """Both encodings, and how well every image goes with every text."""

    image: Encoded
    text: Encoded
    image_embeds: Leaf  # f32[B E] of length 1
    text_embeds: Leaf  # f32[C E] of length 1
    logits: Leaf  # f32[B C], images by texts


class Contrastive(nn.Module):
    """The pair of encoders."""

    config: ContrastiveConfig
    dtype: jnp.dtype = jnp.dtype(jnp.float32)
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        pixels: UInt8[Array, "B h w c"] | Float[Array, "B h w c"],
        tokens: Int[Array, "C T"],
        valid: Bool[Array, "C T"] | None = None,
    ) -> ContrastiveOutput:
        """Encodes images and texts, of which there may be different numbers, and compares all with all."""
        c = self.config
        image = ViT(c.vision, self.dtype, self.remat, name="vision").encode(pixels)
        text = TextEncoder(c.text, self.dtype, self.remat, name="text")(tokens, valid)
        scale = self.param("logit_scale", named(nn.initializers.constant(c.initial_scale)), ())
        bias = None
        if c.loss == "sigmoid":
            bias = self.param("logit_bias", named(nn.initializers.constant(c.initial_bias)), ())
        images, texts = unit(image.pooled), unit(text.pooled)
        return ContrastiveOutput(image, text, images, texts, similarity(images, texts, scale, bias))


def unit(x: Float[Array, "B E"]) -> Float[Array, "B E"]:
    """Vectors of length 1, in float32."""
    wide = x.astype(jnp.float32)
    return wide / jnp.linalg.norm(wide, axis=-1, keepdims=True)


def similarity(
    images: Float[Array, "B E"],
    texts: Float[Array, "C E"],
    scale: Float[Array, ""],
    bias: Float[Array, ""] | None,
) -> Float[Array, "B C"]:
    """``exp(scale) * <image, text> (+ bias)`` for every pair."""
    logits = jnp.exp(scale) * jnp.matmul(images, texts.T, precision="highest")
    return logits if bias is None else logits + bias


def pair_loss(output: ContrastiveOutput, config: ContrastiveConfig) -> Float[Array, ""]:
    """The loss of the config on a batch whose i-th image and i-th text belong together."""
    if config.loss == "sigmoid":
        return losses.sigmoid_contrastive(output.logits)
    return losses.softmax_contrastive(output.logits)
