"""What the configs of text encoders have in common: the properties of ``EncoderConfig`` that follow."""

from __future__ import annotations


class ReadsText:
    """A config with ``vocab_size``, ``max_length`` and ``embed_dim``."""

    max_length: int
    embed_dim: int

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of the longest text."""
        return (self.max_length,)

    @property
    def num_tokens(self) -> int:
        """Tokens of the longest text."""
        return self.max_length

    @property
    def output_dim(self) -> int:
        """Width of a token."""
        return self.embed_dim

    @property
    def grid(self) -> int:
        """Raises ValueError: the tokens of a text form no square."""
        raise ValueError(f"encoder={type(self).__name__}: the tokens of a text form no square")


def check_length(length: int, longest: int) -> None:
    """Refuses rows that are longer than an encoder reads.

    Raises:
      ValueError: they are.
    """
    if length > longest:
        raise ValueError(f"text of {length} tokens; the encoder has max_length={longest} positions")
