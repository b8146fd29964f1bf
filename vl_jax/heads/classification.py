"""Classification: one of some classes, from the vector of a stream.

Stream --pool--> norm --> logits [B K] --> cross-entropy against the class of the row
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from vl_jax.batch import Given
from vl_jax.data.sample import BadSample, Sample
from vl_jax.data.sources.in_domain import DOMAIN
from vl_jax.fusion.streams import Streams, pool
from vl_jax.nn.layers import LayerNorm, Linear


@dataclasses.dataclass(frozen=True)
class Classification:
    """Which class a row is of."""

    classes: tuple[str, ...]
    name: str = "label"
    stream: str = "image"  # what it reads
    field: str = "label"  # name in ``Sample.labels``
    domain: str = ""  # samples of other domains have no label of it; empty: those of all have one
    label_smoothing: float = 0.0  # share of the target that is spread over all classes
    probe: bool = False  # it learns from the stream, and does not change it

    reads_empty: ClassVar[bool] = True

    def __post_init__(self):
        if len(self.classes) < 2 or len(set(self.classes)) < len(self.classes):
            raise ValueError(
                f"classes={self.classes} of head {self.name!r}: expected two or more, all different"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"label_smoothing={self.label_smoothing} of head {self.name!r} must be in [0, 1)"
            )

    @property
    def inputs(self) -> tuple[str, ...]:
        """The stream it reads."""
        return (self.stream,)

    @property
    def shape(self) -> tuple[int, ...]:
        """A label is one number."""
        return ()

    @property
    def dtype(self) -> str:
        """The index of a class."""
        return "int32"

    def read(self, sample: Sample) -> np.ndarray | None:
        """The index of the sample's class; numbers are compared as they are written.

        Raises:
          BadSample: the label is none of the classes.
        """
        value = sample.labels.get(self.field)
        if value is None or (self.domain and sample.labels.get(DOMAIN) != self.domain):
            return None
        try:
            return np.asarray(self.classes.index(str(value)), np.int32)
        except ValueError:
            message = (
                f"sample {sample.id}: {self.field}={value!r} is none of the classes of head {self.name!r}"
            )
            raise BadSample("unknown_label", message) from None

    def build(self) -> nn.Module:
        """The module."""
        return ClassificationHead(self)

    def sums(
        self, prediction: Float[Array, "B K"], label: Given
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Cross-entropy in nats, hits, and probabilities of the right class, over the rows that have one."""
        target = jax.nn.one_hot(label.values, len(self.classes))
        target = optax.smooth_labels(target, self.label_smoothing)
        weights = label.present.astype(jnp.float32)
        loss = jnp.sum(weights * optax.softmax_cross_entropy(prediction, target))
        right = jnp.argmax(prediction, axis=-1) == label.values
        hits = jnp.sum(jnp.where(right, weights, 0.0))
        share = jnp.take_along_axis(jax.nn.softmax(prediction), label.values[:, None], axis=1)[:, 0]
        return loss, {"accuracy": hits, "probability": jnp.sum(weights * share)}

    def probabilities(self, prediction: Float[np.ndarray, " K"]) -> dict[str, float]:
        """How likely each class is, the likeliest first."""
        shares = np.exp(prediction - np.max(prediction))
        shares = shares / shares.sum()
        return {self.classes[i]: float(shares[i]) for i in np.argsort(-shares, kind="stable")}

    def decode(self, prediction: Float[np.ndarray, " K"]) -> str:
        """The likeliest class."""
        return self.classes[int(np.argmax(prediction))]


class ClassificationHead(nn.Module):
    """Logits in float32."""

    config: Classification

    @nn.compact
    def __call__(self, streams: Streams) -> Float[Array, "B K"]:
        x = pool(streams[self.config.stream])
        x = LayerNorm(name="norm")(jax.lax.stop_gradient(x) if self.config.probe else x)
        logits = Linear(
            len(self.config.classes), ("embed", None), use_bias=True, hidden=False, name="classes"
        )(x)
        return logits.astype(jnp.float32)
