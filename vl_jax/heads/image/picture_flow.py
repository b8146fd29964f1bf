"""Pictures: a picture made of noise, as the vector of a stream asks for.

    Stream --pool--> condition --.
    time -------------------------+--> network --> velocity     (see ``flow``)
    noisy picture ---------------'

In training the objective ``Denoising`` hands it noisy pictures; without any it draws, in ``steps`` steps from
noise, the same picture for the same ``seed``.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image as PilImage

from vl_jax.batch import Given
from vl_jax.data.sample import Sample
from vl_jax.data.sources.in_domain import DOMAIN
from vl_jax.fusion.streams import Stream, Streams, pool
from vl_jax.heads import pixels
from vl_jax.heads.image.dit import DiTConfig
from vl_jax.heads.image.flow import (
    NOISE,
    Noisy,
    VelocityGuess,
    euler,
    guided,
    noisy,
    time_features,
    to_data,
    towards,
)
from vl_jax.heads.image.unet import UNetConfig
from vl_jax.moe.noise import content_of
from vl_jax.nn.layers import LayerNorm, Linear, named

_CHANNELS = 3


@dataclasses.dataclass(frozen=True)
class PictureFlow:
    """What is drawn, by which network, and how; the label of a sample is its own first picture."""

    name: str = "picture"
    stream: str = "text"  # what asks for it
    size: int = 32  # pixels on the side of the picture
    network: UNetConfig | DiTConfig = UNetConfig()
    says: Literal["velocity", "picture"] = "velocity"  # what the network says; a picture becomes a velocity
    width: int = 128  # of the vector that tells the network the time and what is asked for
    steps: int = 20  # from noise to a picture
    guidance: float = 2.0  # 1: as the network says; more: what the condition changes counts more
    dropout: float = 0.1  # share of the training draws without a condition, which guidance needs
    seed: int = 0  # of the noise that a picture is made of, where no other is given
    domain: str = ""  # pictures of other domains are not learnt from; empty: those of all are

    rng: ClassVar[str] = NOISE  # its random stream, see ``HeadConfig``

    def __post_init__(self):
        multiple = self.network.multiple
        if self.size < multiple or self.size % multiple:
            raise ValueError(
                f"size={self.size} of head {self.name!r}: its network needs a multiple of {multiple}"
            )
        if self.steps < 1 or self.guidance < 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"steps={self.steps}, guidance={self.guidance}, dropout={self.dropout} of head "
                f"{self.name!r}: must be >= 1, >= 0 and in [0, 1)"
            )
        if self.width < 2 or self.width % 2:
            raise ValueError(f"width={self.width} of head {self.name!r} must be even")

    @property
    def inputs(self) -> tuple[str, ...]:
        """The stream it reads."""
        return (self.stream,)

    @property
    def shape(self) -> tuple[int, ...]:
        """A picture."""
        return self.size, self.size, _CHANNELS

    @property
    def dtype(self) -> str:
        """Pixels."""
        return "uint8"

    def read(self, sample: Sample) -> np.ndarray | None:
        """The sample's first picture, squeezed to the size; None if it has none, or is of another domain."""
        if not sample.images or (self.domain and sample.labels.get(DOMAIN) != self.domain):
            return None
        picture = sample.images[0]().convert("RGB")
        return np.asarray(picture.resize((self.size, self.size), PilImage.Resampling.BOX))

    def build(self) -> nn.Module:
        """The module."""
        return PictureFlowHead(self)

    def noised(self, label: Given, key: jax.Array) -> Noisy:
        """The pictures of some rows on their way to noise, which ``Denoising`` hands to the module."""
        pictures = jnp.asarray(label.values)
        return noisy(to_data(pictures), content_of(pictures), key, dropout=self.dropout)

    def sums(
        self, prediction: VelocityGuess | Float[Array, "B s s c"], label: Given
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The mean square error of the velocity in each row, summed over the rows that have a picture.

        Raises:
          ValueError: the prediction is a drawn picture, for nothing noisy was handed to the head.
        """
        if not isinstance(prediction, VelocityGuess):
            raise ValueError(f"head {self.name!r} learns from noisy pictures: train it by Denoising")
        error = jnp.mean(jnp.square(prediction.said - prediction.true), axis=(1, 2, 3))
        return jnp.sum(jnp.where(label.present, error, 0.0)), {}

    def shown(self, prediction: Float[np.ndarray, "s s c"]) -> PilImage.Image:
        """The drawn picture of one row."""
        return PilImage.fromarray(np.rint((np.clip(prediction, -1, 1) + 1) * 127.5).astype(np.uint8))

    def decode(self, prediction: Float[np.ndarray, "s s c"]) -> dict[str, Any]:
        """``picture``, a PNG in a data URL."""
        return {"picture": pixels.as_text(self.shown(prediction))}

    def made(self, said: dict[str, Any]) -> bytes:
        """The PNG file of what ``decode`` gave."""
        return pixels.content(said["picture"])


class PictureFlowHead(nn.Module):
    """Velocities of noisy pictures; without any, drawn pictures, f32[B s s c] near -1..1."""

    config: PictureFlow

    def setup(self):
        width, names = self.config.width, (None, "embed")
        self.network = self.config.network.build()
        self.norm = LayerNorm()
        self.asked = Linear(width, names, use_bias=True)
        self.nothing = self.param("nothing", named(nn.initializers.normal(0.02), "embed"), (width,))
        self.time0, self.time1 = (Linear(width, names, use_bias=True) for _ in range(2))

    def __call__(
        self, streams: Streams, given: Noisy | None = None
    ) -> VelocityGuess | Float[Array, "B s s c"]:
        """Says the velocities of noisy pictures; without any, draws.

        Raises:
          ValueError: the stream is not one vector a row.
        """
        c = self.config
        asked = self._condition(streams[c.stream])
        if given is None and not self.is_initializing():
            return self._draw(asked)
        if given is None:
            rows = asked.shape[0]
            nothing = jnp.zeros((rows, *c.shape), jnp.float32)
            return self.velocity(nothing, jnp.zeros(rows), asked)
        asked = jnp.where(given.kept[:, None], asked, self.nothing)
        return VelocityGuess(self.velocity(given.values, given.time, asked), given.velocity)

    def velocity(
        self, x: Float[Array, "B s s c"], time: Float[Array, " B"], asked: Float[Array, "B D"]
    ) -> Float[Array, "B s s c"]:
        """What the network says."""
        features = time_features(time, self.config.width)
        told = asked + self.time1(nn.silu(self.time0(features)))
        said = self.network(x, told).astype(jnp.float32)
        return said if self.config.says == "velocity" else towards(said, x, time)

    def _condition(self, stream: Stream) -> Float[Array, "B D"]:
        """What every row asks for; one whose stream holds nothing asks for nothing."""
        asked = self.asked(self.norm(pool(stream).astype(jnp.float32)))
        return jnp.where(jnp.any(stream.mask, axis=1, keepdims=True), asked, self.nothing)

    def _draw(self, asked: Float[Array, "B D"]) -> Float[Array, "B s s c"]:
        c, rows = self.config, asked.shape[0]
        key = self.make_rng(NOISE) if self.has_rng(NOISE) else jax.random.key(c.seed)
        noise = jax.random.normal(key, (rows, *c.shape))
        free: Any = self.clone(parent=None, name=None)  # a loop holds no bound module
        variables = self.variables
        nothing = jnp.broadcast_to(self.nothing, asked.shape)

        def said(x: jax.Array, t: jax.Array) -> jax.Array:
            if c.guidance == 1:
                return free.apply(variables, x, jnp.full(rows, t), asked, method="velocity")
            twice = jnp.concatenate([x, x]), jnp.full(2 * rows, t), jnp.concatenate([asked, nothing])
            with_, without = jnp.split(free.apply(variables, *twice, method="velocity"), 2)
            return guided(with_, without, c.guidance)

        return euler(said, noise, c.steps)
