"""Byte-level BPE text encoding with the special tokens of DeepSeek-VL2.

Any ``tokenizer.json`` that holds the special strings below works; the shipped one has 2048 entries and
was trained by ``tools/vocabulary.py`` on openly licensed English and Chinese text plus procedural scenes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import tokenizers

from vl_jax.data.sample import IMAGE_PLACEHOLDER
from vl_jax.data.text import patterns
from vl_jax.runtime import json_text
from vl_jax.runtime.storage import buckets

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
IMAGE = IMAGE_PLACEHOLDER
USER = "<|User|>"
ASSISTANT = "<|Assistant|>"
GROUNDING = ("<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>")
SPECIAL = (BOS, EOS, PAD, IMAGE, *GROUNDING, USER, ASSISTANT)
# What a model reads: dialogues, whose marks these tokens are, or texts alone, which need an end and padding.
Reads = Literal["dialogue", "text"]

_CACHED_TEXTS, _CACHED_CHARACTERS = 1 << 14, 64
# Of a ``tokenizer.json``: the largest published ones have 35 MB and three million marks.
_LONGEST_FILE, _MOST_MARKS = 400_000_000, 8_000_000
_SHIPPED = Path(__file__).with_name("tokenizer.json")


@contextlib.contextmanager
def naming(file: str | Path, what: str) -> Iterator[None]:
    """Names the file, in one line, in whatever the library raises: bare ``Exception``, and panics.

    Raises:
      ValueError: something was raised inside.
    """
    try:
        yield
    except BaseException as error:  # a panic is no ``Exception``
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        message = " ".join(str(error).split())[:300]
        raise ValueError(f"{file}: {what}: {message or type(error).__name__}") from None


def parsed(text: str) -> dict[str, Any]:
    """The content of a ``tokenizer.json``, of which no part takes time or memory without bound.

    Raises:
      ValueError: it is no JSON object, it is too large, or a pattern in it may be slow (see ``patterns``).
    """
    found = json_text.parse(text.encode(), longest=_LONGEST_FILE, most_marks=_MOST_MARKS)
    if not isinstance(found, dict):
        raise ValueError(f"must hold an object, not {type(found).__name__}")
    patterns.check_file(found)
    return found


def whole(library: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same one, which leaves texts as long as they are: files may say that it cuts and fills them up."""
    library.no_truncation()
    library.no_padding()
    return library


class Tokenizer:
    """Text to ids and back; special ids never arise from text unless the caller allows them by name.

    ``eos`` and ``pad`` name the end and the padding where they are not the usual ones. A vocabulary that
    ``reads`` texts alone needs no other special token; the marks of dialogues are then -1.
    """

    def __init__(
        self,
        text: str,
        *,
        source: str = "tokenizer.json",
        eos: str = EOS,
        pad: str = PAD,
        reads: Reads = "dialogue",
    ):
        named = {EOS: eos, PAD: pad}
        special = tuple(named.get(s, s) for s in (SPECIAL if reads == "dialogue" else named))
        with naming(source, "not a tokenizer file"):
            description = parsed(text)
            for token in description.get("added_tokens", []):
                # Whatever the file says, the special strings are special: see ``encode``.
                token["special"] = token["special"] or token["content"] in special
            self.plain = whole(tokenizers.Tokenizer.from_str(json.dumps(description, ensure_ascii=False)))
        self._source = source
        missing = [s for s in special if self.plain.token_to_id(s) is None]
        if missing:
            raise ValueError(f"{source}: the vocabulary lacks the special tokens {', '.join(missing)}")
        self.plain.encode_special_tokens = True
        self._cached = functools.lru_cache(maxsize=_CACHED_TEXTS)(self._encode)
        self._ids = {s: self.token_id(s) for s in special}
        self.eos, self.pad = self._ids[eos], self._ids[pad]
        marks = (self._ids.get(s, -1) for s in (BOS, IMAGE, USER, ASSISTANT))  # no token is -1
        self.bos, self.image, self.user, self.assistant = marks

    @functools.cached_property
    def around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What stands before and after a text that is read alone: what the file puts there, and an EOS.

        Raises:
          ValueError: the file leaves the text out, or names what it lacks.
        """
        with naming(self._source, "cannot read the text"):
            bare, whole = (self.plain.encode("a", add_special_tokens=added).ids for added in (False, True))
        first = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), None)
        if first is None:
            raise ValueError(f"{self._source}: what it puts around a text does not hold the text")
        before, after = tuple(whole[:first]), tuple(whole[first + len(bare) :])
        return before, after if self.eos in after else (*after, self.eos)

    @property
    def fingerprint(self) -> str:
        """A name for the whole vocabulary and its rules."""
        return hashlib.sha256(self.plain.to_str().encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """Number of entries, special tokens included."""
        return self.plain.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, allowed: Sequence[str] = ()) -> list[int]:
        """The ids of a text, with nothing added.

        Args:
          text: any Unicode text.
          allowed: special strings that become their special id; all others are spelt out as plain text.

        Raises:
          ValueError: ``allowed`` names a string that is not special.
        """
        encode = self._cached if len(text) <= _CACHED_CHARACTERS else self._encode
        return list(encode(text, tuple(allowed)))

    def places(self, text: str) -> list[int]:
        """Where in a text each of its tokens begins.

        Raises:
          ValueError: the library fails on it.
        """
        with naming(self._source, "cannot read the text"):
            found = self.plain.encode(text, add_special_tokens=False).offsets
        return [start for start, _ in found]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of ids; incomplete UTF-8 shows as U+FFFD.

        Raises:
          ValueError: the library fails on them.
        """
        with naming(self._source, "cannot write the tokens as text"):
            return self.plain.decode(list(ids), skip_special_tokens=skip_special)

    def is_byte(self, token: int) -> bool:
        """See ``pieces.Decodes``."""
        return stands_for_byte(self.plain.id_to_token(token))

    @functools.cached_property
    def added(self) -> dict[str, int]:
        """The entries that are found in a text before it is divided: the special tokens and their like."""
        return {token.content: i for i, token in self.plain.get_added_tokens_decoder().items()}

    def token_id(self, text: str) -> int:
        """The id of one vocabulary entry.

        Raises:
          ValueError: there is no such entry.
        """
        result = self.plain.token_to_id(text)
        if result is None:
            raise ValueError(f"token {text!r}: not in the vocabulary")
        return result

    def _encode(self, text: str, allowed: tuple[str, ...]) -> tuple[int, ...]:
        unknown = [s for s in allowed if s not in self._ids and s not in self.added]
        if unknown:
            raise ValueError(f"allowed={unknown}: not special tokens; known: {', '.join(self._ids)}")
        ids: list[int] = []
        for piece in filter(None, _splitter(allowed).split(text) if allowed else [text]):
            if piece in allowed:
                ids.append(self.token_id(piece))
            else:
                with naming(self._source, "cannot read the text"):
                    ids += self.plain.encode(piece, add_special_tokens=False).ids
        return tuple(ids)


_BYTE = re.compile("<0x[0-9A-F]{2}>")


def stands_for_byte(entry: str | None) -> bool:
    """Whether an entry of a vocabulary is a byte, or nothing, which leaves the bytes around it together."""
    return entry is None or _BYTE.fullmatch(entry) is not None


def recalled(function: Callable[[Tokenizer, str], list[Any]]) -> Callable[[Tokenizer, str], list[Any]]:
    """Remembers what a function makes of short texts: questions and answers recur all the time.

    The lists it gives are shared: they are not to be changed.
    """
    remembered = functools.lru_cache(maxsize=_CACHED_TEXTS)(function)

    @functools.wraps(function)
    def call(tokenizer: Tokenizer, text: str) -> list[Any]:
        return (remembered if len(text) <= _CACHED_CHARACTERS else function)(tokenizer, text)

    return call


@functools.lru_cache(maxsize=64)
def _splitter(allowed: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(allowed, key=len, reverse=True)
    return re.compile("(" + "|".join(re.escape(s) for s in longest_first) + ")")


def load_tokenizer(path: str = "", *, reads: Reads = "dialogue") -> Tokenizer:
    """Loads a ``tokenizer.json`` or the folder of a published checkpoint; empty means the shipped vocabulary.

    Args:
      reads: "text" takes a published vocabulary as it is, with end, padding and all else of its own.

    Raises:
      ValueError: the file is missing, malformed, or lacks a special token.
    """
    file = buckets.here(path) if path else _SHIPPED
    if file.is_dir():
        return load_published_tokenizer(file) if reads == "dialogue" else _load_for_texts(file)
    if not file.is_file():
        raise ValueError(f"tokenizer={path!r}: no such file {file}")
    return Tokenizer(file.read_text(encoding="utf-8"), source=str(file))


def load_published_tokenizer(folder: str | Path) -> Tokenizer:
    """Loads the tokenizer of a published checkpoint (``tokenizer.json``, ``tokenizer_config.json``).

    Marks that the file lacks get the next free ids, in the order in which the published processor adds
    them: padding (unless the config names another padding token), image, grounding, roles.

    Raises:
      ValueError: a file is missing or malformed, or sequences begin or end with another token than ours.
    """
    file, config_file, named = _named_tokens(folder)
    for name, ours in (("bos", BOS), ("eos", EOS)):
        if named[name] not in (None, ours):
            raise ValueError(f"{config_file}: {name}_token={named[name]!r}: must be {ours!r}")
    pad = named["pad"] or PAD
    with naming(file, "not a tokenizer file"):
        text = file.read_text(encoding="utf-8")
        parsed(text)
        published = tokenizers.Tokenizer.from_str(text)
    marks = [pad] * (named["pad"] is None) + [IMAGE, *GROUNDING, USER, ASSISTANT]
    published.add_special_tokens([tokenizers.AddedToken(m, normalized=False) for m in marks])
    return Tokenizer(published.to_str(), source=str(file), pad=pad)


def _load_for_texts(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint that reads texts alone; without a padding token, the end is padding too.

    Raises:
      ValueError: a file is missing or malformed, or names no end token.
    """
    file, config_file, named = _named_tokens(folder)
    eos = named["eos"]
    if eos is None:
        raise ValueError(f"{config_file}: names no eos_token, with which a text would end")
    with naming(file, "not a tokenizer file"):
        text = file.read_text(encoding="utf-8")
    return Tokenizer(text, source=str(file), eos=eos, pad=named["pad"] or eos, reads="text")


def _named_tokens(folder: str | Path) -> tuple[Path, Path, dict[str, str | None]]:
    """Both files of a published tokenizer, and how it calls its special tokens.

    Raises:
      ValueError: the vocabulary is missing, or the config malformed.
    """
    file, config_file = Path(folder) / "tokenizer.json", Path(folder) / "tokenizer_config.json"
    if not file.is_file():
        raise ValueError(f"tokenizer={str(folder)!r}: no such file {file}")
    try:
        config = json_text.read(config_file) if config_file.is_file() else {}
        named = {name: config.get(f"{name}_token") for name in ("bos", "eos", "pad")}
        named = {k: v["content"] if isinstance(v, dict) else v for k, v in named.items()}
    except (ValueError, KeyError, AttributeError):
        raise ValueError(f"{config_file}: not a tokenizer config") from None
    wrong = [name for name, value in named.items() if not isinstance(value, str | None)]
    if wrong:
        raise ValueError(f"{config_file}: not a tokenizer config: {wrong[0]}_token={named[wrong[0]]!r}")
    return file, config_file, named
