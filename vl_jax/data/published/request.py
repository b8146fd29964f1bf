"""What a user asks a processor for, checked: a conversation as messages, or a raw prompt, with pictures."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image as PilImage

from vl_jax.data.levels import LevelsError
from vl_jax.data.picture import Orientation, to_rgb
from vl_jax.data.sample import IMAGE_PLACEHOLDER, FileImage, Image, Sample, Turn
from vl_jax.data.text.chat_template import ChatTemplate
from vl_jax.data.text.tokenizer import ASSISTANT, EOS, USER

_log = logging.getLogger(__name__)

Message = Mapping[str, Any]  # role, content, and perhaps images, the pictures of its <image> marks
Picture = PilImage.Image | str | Path

_ROLES = {
    USER: "user",
    "user": "user",
    ASSISTANT: "assistant",
    "assistant": "assistant",
    "system": "system",
    "deepseekapi-sys": "system",
}


@dataclass(frozen=True)
class Request:
    """One sequence to make: of a conversation, or of a ``prompt``, a text taken as it is.

    ``images`` are the pictures of the ``<image>`` marks, in order; None takes those of the messages.
    For generation (``inference``) the last assistant's turn is empty, and no EOS ends the sequence.
    ``wrap_prompt`` turns the prompt into a user's turn. ``mask_prompt`` None is what the checkpoint says.
    """

    conversation: Sequence[Message] = ()
    prompt: str | None = None
    images: Sequence[Picture] | None = None
    inference: bool = True
    wrap_prompt: bool = False
    mask_prompt: bool | None = None
    system_prompt: str = ""


def to_sample(request: Request, *, name: str, orientation: Orientation = "shown") -> Sample:
    """The sample of a request.

    Args:
      name: what messages call it.
      orientation: which way up picture files are read; a picture that is open already stays as it is.

    Raises:
      ValueError: roles, turns, images or their marks break a rule; the message begins with ``name``.
    """
    if bool(request.conversation) == (request.prompt is not None):
        raise ValueError(f"{name}: give either messages or a prompt")
    if request.prompt is not None:
        system, turns = request.system_prompt, (Turn(request.prompt, ""),)
    else:
        system, turns = _turns(request, name)
        if request.system_prompt:
            # The published processor shows it and never reads it; ids must stay the same.
            _log.warning("%s: system_prompt is for display; begin with a message of role system", name)
    if IMAGE_PLACEHOLDER in system:
        raise ValueError(f"{name}: {IMAGE_PLACEHOLDER} in the system text; it may stand in users' turns only")
    pictures = request.images
    if pictures is None:
        pictures = [picture for message in request.conversation for picture in message.get("images") or ()]
    marks = sum(turn.question.count(IMAGE_PLACEHOLDER) for turn in turns)
    if marks != len(pictures):
        raise ValueError(f"{name}: {marks} {IMAGE_PLACEHOLDER} marks for {len(pictures)} images")
    return Sample(name, turns, tuple(_open(picture, name, orientation) for picture in pictures), system)


def templated(template: ChatTemplate, sample: Sample, *, inference: bool) -> str:
    """The text of a conversation as a template writes it; for inference it ends where an answer would begin.

    Raises:
      ValueError: see ``ChatTemplate.text``.
    """
    said = [("system", sample.system)] if sample.system else []
    for turn in sample.turns:
        said += [("user", turn.question), ("assistant", turn.answer)]
    said = said[:-1] if inference else said
    messages = [{"role": role, "content": template.content(text, parts=True)} for role, text in said]
    return template.text(messages, add_generation_prompt=inference)


def _turns(request: Request, name: str) -> tuple[str, tuple[Turn, ...]]:
    """The system text and the turns of a conversation."""
    messages = list(request.conversation)
    roles = []
    for number, message in enumerate(messages):
        if not isinstance(message.get("content"), str):
            raise ValueError(f"{name}: message {number} has no text under content")
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            known = ", ".join(_ROLES)
            raise ValueError(f"{name}: unknown role {role!r} of message {number}, known: {known}")
        roles.append(_ROLES[role])
    contents = [message["content"] for message in messages]
    system = contents.pop(0) if roles[0] == "system" else ""
    first = len(messages) - len(contents)
    for number, role in enumerate(roles[first:], start=first):
        expected = ("user", "assistant")[(number - first) % 2]
        if role != expected:
            raise ValueError(f"{name}: message {number} has role {role}, expected {expected}")
    if not contents or len(contents) % 2:
        raise ValueError(f"{name}: must end with an assistant's message, empty where an answer is wanted")
    turns = tuple(Turn(q, a) for q, a in zip(contents[::2], contents[1::2], strict=True))
    if any(IMAGE_PLACEHOLDER in turn.answer for turn in turns):
        raise ValueError(f"{name}: {IMAGE_PLACEHOLDER} in an answer; it may stand in users' turns only")
    if request.inference and turns[-1].answer.strip():
        raise ValueError(f"{name}: the last assistant's message must be empty for inference")
    return system, turns


def _open(picture: Picture, name: str, orientation: Orientation) -> Image:
    """The picture as a function; a file is decoded once."""
    if isinstance(picture, PilImage.Image):
        try:
            decoded = to_rgb(picture)
        except LevelsError as error:
            raise ValueError(f"{name}: a picture: {error}") from None
    else:
        decoded = FileImage(Path(picture), name, orientation=orientation)()
    return lambda: decoded


def display_text(request: Request) -> str:
    """The conversation as the published processor shows it; no ids are made from it."""
    system = f"{request.system_prompt}\n\n" if request.system_prompt else ""
    if request.prompt is not None and not request.wrap_prompt:
        return request.prompt
    messages = [(m["role"], m["content"].strip()) for m in request.conversation]
    if request.prompt is not None:
        messages = [(USER, request.prompt.strip()), (ASSISTANT, "")]
    # Separators go by the place in the list, so a system message swaps them.
    ends = ("\n\n", EOS)
    parts = [f"{r}: {text}{ends[i % 2]}" if text else f"{r}:" for i, (r, text) in enumerate(messages)]
    return (system + "".join(parts)).strip()
