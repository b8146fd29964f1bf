"""What ends the answer of a published model: every token and string that its folder names, in whatever file.

config.json, also below text_config      eos_token_id: one id or a list
generation_config.json                   the same; stop_token_ids, stop_words_ids, stop_strings
tokenizer_config, special_tokens_map     eos_token, eot_token
the chat template                        the token that it writes behind an answer
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vl_jax.data.text.chat_template import SPECIAL, TOKENIZER, ChatTemplate, read_object, token_text
from vl_jax.data.text.tokenizer import Tokenizer
from vl_jax.runtime.storage import buckets

CONFIG, GENERATION = "config.json", "generation_config.json"
# The configs of the language model inside another model's.
INNER = ("text_config", "language_config", "llm_config", "decoder")
IDS = ("eos_token_id", "eot_token_id", "stop_token_ids", "stop_words_ids")
TOKENS = ("eos_token", "eot_token")


@dataclass(frozen=True)
class Stops:
    """What ends an answer, and is no part of it."""

    tokens: tuple[int, ...] = ()
    strings: tuple[str, ...] = ()


def read_stops(folder: str | Path, added: Mapping[str, int], template: ChatTemplate | None) -> Stops:
    """Everything that ends an answer of a folder's model.

    Args:
      added: the special tokens of its tokenizer and their like, by their text.

    Raises:
      ValueError: a file is malformed, or names an end that is none; in one line that names the file.
    """
    folder = Path(folder)
    tokens = list(named_ids(folder))
    for name in (TOKENIZER, SPECIAL):
        fields = read_object(folder / name)
        named = [token_text(fields.get(key)) for key in TOKENS]
        tokens += [added[text] for text in named if text is not None and text in added]
    if template is not None:
        tokens += _turn_ends(template, added)
    return Stops(tuple(dict.fromkeys(tokens)), tuple(dict.fromkeys(_strings(folder / GENERATION))))


def stops_of_data(path: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """What ends an answer of a run: its tokenizer's end, and what that tokenizer's folder names beside it.

    Args:
      path: ``tokenizer`` of a data config: a folder, a file, or empty.

    Raises:
      ValueError: as ``read_stops``.
    """
    folder = buckets.here(path)
    named = read_stops(folder, tokenizer.added, None).tokens if path and folder.is_dir() else ()
    return tuple(dict.fromkeys((tokenizer.eos, *named)))


def named_ids(folder: Path) -> Iterator[int]:
    """The ids of end tokens that a folder's configs name.

    Raises:
      ValueError: one is neither an id nor a list of ids.
    """
    for name in (CONFIG, GENERATION):
        fields = read_object(folder / name)
        inner = [fields[key] for key in INNER if isinstance(fields.get(key), Mapping)]
        for part in (fields, *inner):
            for key in IDS:
                yield from _ids(folder / name, key, part.get(key))


def _ids(file: Path, key: str, value: Any) -> Iterator[int]:
    given = value if isinstance(value, list) else [value]
    for one in given:
        # A list of lists names sequences, of which those of one token are tokens.
        one = one[0] if isinstance(one, list) and len(one) == 1 else one
        if one is None or isinstance(one, list):
            continue
        if type(one) is not int:
            raise ValueError(f"{file}: {key}={value!r}: must be a token's id, or a list of them")
        if 0 <= one < 2**31:  # some configs write -1 for none
            yield one


def _strings(file: Path) -> Iterator[str]:
    value = read_object(file).get("stop_strings")
    for one in value if isinstance(value, list) else [value]:
        if one is not None and not isinstance(one, str):
            raise ValueError(f"{file}: stop_strings={value!r}: must be a text, or a list of texts")
        if one:
            yield one


def _turn_ends(template: ChatTemplate, added: Mapping[str, int]) -> list[int]:
    """The token behind an answer, as far as one is there: at the end, or else before the next question."""
    for text in template.endings:
        found = [token for token in added if token and text.lstrip().startswith(token)]
        if found:
            return [added[max(found, key=len)]]
    return []
