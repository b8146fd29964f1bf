"""The chat template of a published tokenizer: a program in Jinja that makes one text of a conversation.

It is somebody else's program: it runs in a sandbox that can read what it is given and change nothing.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

PROGRAM, WRAPPED, TOKENIZER = "chat_template.jinja", "chat_template.json", "tokenizer_config.json"


@dataclass(frozen=True)
class ChatTemplate:
    """A template, compiled, and the special tokens that it may name (``bos_token`` and so on)."""

    file: Path
    template: jinja2.Template
    special: Mapping[str, str]

    @classmethod
    def load(cls, folder: str | Path) -> ChatTemplate | None:
        """Reads a folder's template: a file of its own comes before the tokenizer's config; None without any.

        Raises:
          ValueError: a file is no JSON object, or the template is none; in one line that names the file.
        """
        folder = Path(folder)
        config = _read_object(folder / TOKENIZER)
        file, text = folder / PROGRAM, None
        if file.is_file():
            text = file.read_text(encoding="utf-8")
        for name in (WRAPPED, TOKENIZER):
            if text is None:
                file = folder / name
                text = _named_default(file, _read_object(file).get("chat_template"))
        if text is None:
            return None
        try:
            template = _environment().from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"{file}: line {error.lineno} of the chat template: {error.message}") from None
        special = {key: _content(value) for key, value in config.items() if key.endswith("_token")}
        return cls(file, template, {key: value for key, value in special.items() if value is not None})

    def text(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        """The text of messages ``{"role", "content"}``, and perhaps the beginning of an answer.

        Raises:
          ValueError: the template refuses the conversation, or fails on it.
        """
        given = {"messages": list(messages), "tools": None, "documents": None, **self.special}
        try:
            return self.template.render(add_generation_prompt=add_generation_prompt, **given)
        except Exception as error:  # A program of others raises what it likes, ``TypeError`` for one.
            raise ValueError(f"{self.file}: the chat template: {error}") from None


def _environment() -> ImmutableSandboxedEnvironment:
    """The language in which published templates are written: its options, functions and filters."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own filter escapes what HTML would misread.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _read_object(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: must hold an object, not {type(value).__name__}")
    return value


def _named_default(file: Path, value: Any) -> str | None:
    """A template as files give it: one text, or a list of named ones, of which ``default`` is for talking."""
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default", value)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{file}: chat_template must be a text, or a list with one that is named default")
    return value


def _content(token: Any) -> str | None:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None
