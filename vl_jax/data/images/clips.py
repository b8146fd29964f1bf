"""Clips as pictures: frames that lie in files, sampled evenly.

{"frames": "clips/jump" | ["f0.jpg", "f1.jpg", ...], "question": "What happens?", "answer": "A man jumps."}

A folder means the pictures in it, by their names, in which numbers count as numbers. In a conversation one
``<video>`` (or the only ``<image>``) marks where the frames belong. Their sound is a file of its own: see
``audio``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vl_jax.data.sample import IMAGE_PLACEHOLDER, BadSample, path_in

VIDEO_PLACEHOLDER = "<video>"
_ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"})


def frame_names(frames: Any, folder: Path, where: str, *, most: int) -> list[str]:
    """The frames of a clip that are used, relative to the (resolved) image folder.

    Args:
      frames: their names, or that of a folder.
      most: longer clips are sampled, their first and last frame included.

    Raises:
      BadSample: there is none, or the folder is not inside the image folder.
    """
    if isinstance(frames, str):
        frames = frames_in(frames, folder, where)
    if not isinstance(frames, list) or not frames or not all(isinstance(name, str) for name in frames):
        raise BadSample("bad_image_field", f"{where}: frames must be a folder or a list of paths")
    return [frames[i] for i in evenly(len(frames), most)]


def frames_in(frames: str, folder: Path, where: str) -> list[str]:
    """The pictures in a folder of frames, in the order of their names, relative to the (resolved) ``folder``.

    Raises:
      BadSample: there is no such folder, or it is not inside.
    """
    place = path_in(folder, frames, where, kind="image")
    try:
        found = [f.name for f in place.iterdir() if f.suffix.lower() in _ENDINGS]
    except (OSError, ValueError) as error:
        raise BadSample("missing_image", f"{where}: no folder of frames {place}: {error}") from None
    return [f"{frames}/{name}" for name in sorted(found, key=_natural)]


def evenly(count: int, most: int) -> list[int]:
    """At most so many of the numbers below ``count``, at equal distances as nearly as can be."""
    if count <= most:
        return list(range(count))
    if most == 1:
        return [count // 2]
    return [(i * (count - 1) + (most - 1) // 2) // (most - 1) for i in range(most)]


def mark_frames(messages: Sequence[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    """(role, text) of messages with a mark for every frame where a question had one for the clip.

    In an answer such a mark is text.
    """
    asked = [text for role, text in messages if role == "user"]
    mark = VIDEO_PLACEHOLDER if any(VIDEO_PLACEHOLDER in text for text in asked) else IMAGE_PLACEHOLDER
    if sum(text.count(mark) for text in asked) != 1:
        return list(messages)
    every = "\n".join([IMAGE_PLACEHOLDER] * count)
    return [(role, text.replace(mark, every) if role == "user" else text) for role, text in messages]


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d{1,18})", name)]
