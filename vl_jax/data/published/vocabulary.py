"""The tokenizer of a published checkpoint, with whatever it puts before a text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers

from vl_jax.data.published.stops import named_ids
from vl_jax.data.text.chat_template import SPECIAL, TOKENIZER, read_object, token_text
from vl_jax.data.text.tokenizer import naming, parsed, stands_for_byte, whole


class PublishedTokenizer:
    """A checkpoint's own ``tokenizer.json``; its end token is the one that the first of its files names."""

    def __init__(self, folder: str | Path):
        """Reads the files of a folder.

        Raises:
          ValueError: one is missing or malformed, or the vocabulary lacks the end token.
        """
        folder = Path(folder)
        self.file = folder / "tokenizer.json"
        if not self.file.is_file():
            raise ValueError(f"tokenizer={str(folder)!r}: no such file {self.file}")
        with naming(self.file, "not a tokenizer file"):
            text = self.file.read_text(encoding="utf-8")
            parsed(text)
            self._plain = whole(tokenizers.Tokenizer.from_str(text))
        self.bos_text = self._named(folder, "bos_token")
        ids = [self._plain.id_to_token(token) for token in named_ids(folder)]
        self.eos_text: str = self._named(folder, "eos_token") or next(filter(None, ids), "</s>")
        found = self._plain.token_to_id(self.eos_text)
        if found is None:
            raise ValueError(f"{self.file}: the vocabulary lacks the end token {self.eos_text!r}")
        self.eos: int = found

    @staticmethod
    def _named(folder: Path, key: str) -> str | None:
        """A special token as the files name it.

        Raises:
          ValueError: what stands there is no token.
        """
        for name in (TOKENIZER, SPECIAL):
            value = read_object(folder / name).get(key)
            if value is not None:
                text = token_text(value)
                if text is None:
                    raise ValueError(f"{folder / name}: not a tokenizer config: {key}={value!r}")
                if text:
                    return text
        return None

    @property
    def added(self) -> dict[str, int]:
        """The entries that are found in a text before it is divided: the special tokens and their like."""
        return {token.content: i for i, token in self._plain.get_added_tokens_decoder().items()}

    def encode(self, text: str, *, complete: bool = False) -> list[int]:
        """The ids of a text as the checkpoint reads it, special tokens in it included.

        Args:
          complete: the text has all special tokens; otherwise the tokenizer puts its own around it.

        Raises:
          ValueError: the tokenizer fails on it.
        """
        with naming(self.file, "cannot read the text"):
            return self._plain.encode(text, add_special_tokens=not complete).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; incomplete UTF-8 shows as U+FFFD.

        Raises:
          ValueError: the tokenizer fails on them.
        """
        with naming(self.file, "cannot write the tokens as text"):
            return self._plain.decode(list(ids), skip_special_tokens=False)

    def is_byte(self, token: int) -> bool:
        """See ``pieces.Decodes``."""
        return stands_for_byte(self._plain.id_to_token(token))

    def text_of(self, token: int) -> str:
        """The entry of the vocabulary with this id.

        Raises:
          ValueError: there is none.
        """
        found = self._plain.id_to_token(token)
        if found is None:
            raise ValueError(f"token {token}: not in the vocabulary of the tokenizer")
        return found
