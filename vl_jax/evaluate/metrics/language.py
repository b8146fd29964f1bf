"""How well a language model foresees a text: perplexity by token, and bits by byte.

    perplexity = exp(sum of -ln p / tokens)        bits per byte = sum of -ln p / (ln 2 · bytes in UTF-8)

Perplexities of two tokenizers cannot be compared; bits per byte can. In packed rows a token must not see
another document, and picture tokens are counted apart or left out.
"""

from __future__ import annotations

import math

from vl_jax.evaluate.metrics.per_sample import PerSample, SampleList


class TextLosses:
    """The losses of texts, one after another."""

    def __init__(self):
        self._found = SampleList(("nats_per_token", "bits_per_byte"))

    def update(self, loss: float, tokens: int, num_bytes: int, *, cluster: str | None = None) -> None:
        """Takes one text.

        Args:
          loss: the sum over its tokens of the negative logarithm, to base e, of their probability.
          tokens: that the sum is over.
          num_bytes: of the text that those tokens write, in UTF-8.

        Raises:
          ValueError: the loss is negative or not finite, or there is no token or no byte.
        """
        number = len(self._found)
        if not (math.isfinite(loss) and loss >= 0):
            raise ValueError(f"sample {number}: loss={loss}: expected a finite number of 0 or more")
        if tokens < 1 or num_bytes < 1:
            raise ValueError(f"sample {number}: tokens={tokens}, num_bytes={num_bytes}: both must be >= 1")
        bits = loss / math.log(2)
        values = {"nats_per_token": (float(loss), float(tokens)), "bits_per_byte": (bits, float(num_bytes))}
        self._found.add(values, cluster)

    def samples(self) -> dict[str, PerSample]:
        """Nats by token and bits by byte, text by text; perplexity is the exponential of the former."""
        return self._found.samples()

    def compute(self) -> dict[str, float]:
        """``perplexity``, ``nats_per_token`` and ``bits_per_byte`` of all texts; ValueError without one."""
        scores = self._found.compute()
        nats = scores["nats_per_token"]
        return {"perplexity": math.exp(nats) if nats < 700 else math.inf, **scores}
