"""The chat template of a published folder: a program in Jinja that makes one text of a conversation.

It is somebody else's program: it runs in a process of its own (``rendering``), with bounded time, memory and
output.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vl_jax.data.sample import IMAGE_PLACEHOLDER
from vl_jax.data.text import rendering
from vl_jax.runtime import json_text

PROGRAM, TOKENIZER, SPECIAL = "chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json"
# Where a template may stand, the first one wins: files of its own, the processor's config, the tokenizer's.
PLACES = ("chat_template.json", "processor_config.json", TOKENIZER)

# For the process to start, and for an answer: where many others run, it gets little of the processor.
START_SECONDS, WAIT_SECONDS = 60.0, 20.0
_LONGEST_ANSWER = 16 * rendering.OUTPUT  # characters of a line; JSON writes some of them as six
# A text that no template writes by itself: what stands behind it ends a turn.
_ASKED, _SAID = "vljaxquestion", "vljaxanswer"
_LISTED = re.compile(r"""['"]type['"]""")  # in the text of a list of parts

Message = Mapping[str, Any]


@dataclass(frozen=True)
class ChatTemplate:
    """A template, and how it takes messages and ends turns."""

    file: Path
    source: str
    special: Mapping[str, str]  # the special tokens that it may name (``bos_token`` and so on)
    takes_text: bool = True  # it writes contents that are texts
    takes_parts: bool = False  # it writes contents that are lists of parts, pictures and texts
    endings: tuple[str, ...] = ()  # what it writes behind an answer: at the end, and before the next question

    @classmethod
    def load(cls, folder: str | Path) -> ChatTemplate | None:
        """Reads a folder's template; None without any.

        Raises:
          ValueError: a file is no JSON object, or the template is none; in one line that names the file.
        """
        folder = Path(folder)
        found = _find(folder)
        if found is None:
            return None
        named = {**read_object(folder / SPECIAL), **read_object(folder / TOKENIZER)}
        special = {key: token_text(value) for key, value in named.items() if key.endswith("_token")}
        given = {key: value for key, value in special.items() if value is not None}
        return cls(*found, given)._examined()

    def text(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The text of messages ``{"role", "content"}``, and perhaps the beginning of an answer.

        Raises:
          ValueError: the template refuses the conversation, fails on it, or takes more time, memory or room
            than a template may.
        """
        (result,) = self._render([self._given(messages, add_generation_prompt)])
        if "text" not in result:
            raise ValueError(f"{self.file}: the chat template: {result['error']}")
        return result["text"]

    def content(self, text: str, *, parts: bool) -> Any:
        """A message's content as the template takes it.

        Args:
          text: ``<image>`` marks where a picture stands.
          parts: whether a list of parts is wanted, if the template takes one.
        """
        if not (self.takes_parts and (parts or not self.takes_text)):
            return text
        texts = text.split(IMAGE_PLACEHOLDER)
        result: list[dict[str, str]] = []
        for number, piece in enumerate(texts):
            # A line break between a picture and a text is the template's to write.
            piece = piece.removeprefix("\n") if number else piece
            piece = piece.removesuffix("\n") if number < len(texts) - 1 else piece
            result += [{"type": "image"}] if number else []
            result += [{"type": "text", "text": piece}] if piece else []
        return result or [{"type": "text", "text": ""}]

    def _given(self, messages: Sequence[Message], add_generation_prompt: bool) -> dict[str, Any]:
        return {
            "messages": list(messages),
            "tools": None,
            "documents": None,
            **self.special,
            "add_generation_prompt": add_generation_prompt,
        }

    def _render(self, given: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
        try:
            job = json.dumps({"template": self.source, "given": given})
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{self.file}: a message holds what JSON cannot: {error}") from None
        try:
            answer = _PROCESS.ask(job)
        except ValueError as error:
            raise ValueError(f"{self.file}: the chat template: {error}") from None
        if "error" in answer:
            line = f"line {answer['line']} of " if answer["line"] else ""
            raise ValueError(f"{self.file}: {line}the chat template: {answer['error']}")
        return answer["results"]

    def _examined(self) -> ChatTemplate:
        """The template, tried on small conversations."""
        talk = [("user", _ASKED), ("assistant", _SAID), ("user", _ASKED)]
        as_text = [{"role": role, "content": text} for role, text in talk]
        as_parts = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in talk]
        shown: list[Message] = [{"role": "user", "content": [{"type": "image"}, *as_parts[0]["content"]]}]
        tried = [
            self._given(as_text[:1], True),
            self._given(as_parts[:1], True),
            self._given(shown, True),
            *(self._given(messages[:n], False) for messages in (as_text, as_parts) for n in (2, 3)),
        ]
        text, parts, picture, *ends = (result.get("text", "") for result in self._render(tried))
        # A template that knows texts only writes a list as Python does.
        takes_parts = any(_ASKED in t and not _LISTED.search(t) for t in (parts, picture))
        behind = [t.rpartition(_SAID)[2] for t in ends if _SAID in t]
        return ChatTemplate(
            self.file, self.source, self.special, _ASKED in text, takes_parts, tuple(dict.fromkeys(behind))
        )


class _Process:
    """The process that renders: started when it is first needed, and again after it was ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None

    def ask(self, job: str) -> dict[str, Any]:
        """The answer to a line.

        Raises:
          ValueError: it took too much time, or the process ended without an answer.
        """
        with self._lock:
            child = self._child if self._child is not None and self._child.poll() is None else self._start()
            assert child.stdin is not None
            try:
                child.stdin.write(job + "\n")
                child.stdin.flush()
            except OSError:
                pass  # it ended; there is no answer then
            line = self._line(child, WAIT_SECONDS)
            if not line.endswith("\n"):
                self.stop()
                raise ValueError(
                    f"was ended: it took more than {rendering.SECONDS} s or {rendering.MEMORY >> 20} MiB"
                )
            return json.loads(line)

    def _start(self) -> subprocess.Popen[str]:
        path = os.pathsep.join(filter(None, sys.path))
        # Without -P the folder of the file would come first, where modules have the names of others.
        child = self._child = subprocess.Popen(
            [sys.executable, "-P", str(rendering.__file__)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="ascii",
            env={**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "ascii"},
        )
        if self._line(child, START_SECONDS) != "ready\n":
            self.stop()
            raise ValueError(f"its process does not start: {sys.executable} -P {rendering.__file__}")
        return child

    @staticmethod
    def _line(child: subprocess.Popen[str], seconds: float) -> str:
        """The next line; what there is of it if the time runs out or the process ends."""
        assert child.stdout is not None
        timer = threading.Timer(seconds, child.kill)
        timer.start()
        try:
            return child.stdout.readline(_LONGEST_ANSWER)
        finally:
            timer.cancel()

    def forget(self) -> None:
        """Begins anew, without ending the process that was started."""
        self.__init__()

    def stop(self) -> None:
        """Ends the process, if there is one."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.communicate(timeout=WAIT_SECONDS)


_PROCESS = _Process()
atexit.register(_PROCESS.stop)
if hasattr(os, "register_at_fork"):  # a copy of this process has no right to the lines of the other
    os.register_at_fork(after_in_child=_PROCESS.forget)


def _find(folder: Path) -> tuple[Path, str] | None:
    """The file with the template, and the template."""
    if (folder / PROGRAM).is_file():
        try:
            return folder / PROGRAM, (folder / PROGRAM).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{folder / PROGRAM}: not a text: {error}") from None
    for name in PLACES:
        text = _for_talking(folder / name, read_object(folder / name).get("chat_template"))
        if text is not None:
            return folder / name, text
    return None


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file.

    Raises:
      ValueError: it is none; the message names the file.
    """
    try:
        value = json_text.read(file) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: must hold an object, not {type(value).__name__}")
    return value


def token_text(token: Any) -> str | None:
    """A special token as configs write it: its text, or an object that holds it; None for anything else."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _for_talking(file: Path, value: Any) -> str | None:
    """A template as files give it: one text, or named ones, of which ``default`` is for talking."""
    named: dict[Any, Any] | None = value if isinstance(value, dict) else None
    if isinstance(value, list):
        entries = [entry for entry in value if isinstance(entry, dict)]
        named = {str(entry.get("name")): entry.get("template") for entry in entries}
    if named:
        (only,) = named if len(named) == 1 else ("default",)
        if only not in named:
            raise ValueError(
                f"{file}: chat_template must be a text, or a list with one that is named default; it names "
                f"{', '.join(map(str, named))}"
            )
        value = named[only]
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{file}: chat_template must be a text, or a list with one that is named default")
    return value
