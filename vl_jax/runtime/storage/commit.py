"""How the folder of a step becomes a whole checkpoint, chosen once for each folder of checkpoints.

    <step>.orbax-checkpoint-tmp --renamed--> <step>                     where a folder can be renamed
    <step>/ without commit_success.txt --that file, last--> <step>/     in buckets, and where one is mounted

The second way is marked in the folder of checkpoints, so that readers know what a step without the file is,
and so that the folder may be copied to any other storage.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import path as orbax_path

from vl_jax.runtime.storage import buckets, folders

MARK = "commit_files.txt"  # in a folder of checkpoints
COMMITTED = "commit_success.txt"  # orbax's, in each folder that is whole
_SAID = "This folder is where no folder can be renamed: a step is whole if it holds commit_success.txt.\n"
_log = logging.getLogger(__name__)


def by_file(folder: Any, *, read_only: bool) -> bool:
    """Whether steps become whole by a file; if need be it is tried out, and marked.

    All processes of a run ask together, and the first one decides.

    Args:
      folder: of checkpoints; a path here or in a bucket.
    """
    chosen = False
    if jax.process_index() == 0:
        chosen = (folder / MARK).exists()
        if not chosen and not read_only and (buckets.is_bucket(folder) or not folders.can_be_renamed(folder)):
            _mark(folder)
            chosen = True
            _log.info("%s: no folder can be renamed there, so steps are committed by a file", folder)
    if jax.process_count() > 1:
        chosen = bool(multihost_utils.broadcast_one_to_all(np.int32(chosen)))
    return chosen


def _mark(folder: Any) -> None:
    """Marks the folder; the steps in it were renamed before they came here, and are whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for step in _inside(folder):
        if step.name.isdecimal() and step.is_dir():
            for part in (*(part for part in step.iterdir() if part.is_dir()), step):
                (part / COMMITTED).write_text("renamed before\n")
    (folder / MARK).write_text(_SAID)


def path_class(by_a_file: bool) -> type[Any]:
    """Orbax's class for it."""
    kinds = orbax_path.atomicity
    return kinds.CommitFileTemporaryPath if by_a_file else kinds.AtomicRenameTemporaryPath


def unfinished(folder: Any, *, by_a_file: bool) -> list[Any]:
    """The folders of steps that are not whole."""
    found = list(folder.glob("*.orbax-checkpoint-tmp*"))
    if by_a_file:
        steps = (step for step in _inside(folder) if step.name.isdecimal())
        found += [step for step in steps if step.is_dir() and not (step / COMMITTED).exists()]
    return found


def _inside(folder: Any) -> list[Any]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:  # in a bucket, what is empty is not there
        return []


def is_whole(step: Any, *, by_a_file: bool) -> bool:
    """Whether the folder of a step is a whole checkpoint with its record."""
    return (step / "record").exists() and (not by_a_file or (step / COMMITTED).exists())


def remove(folder: Any) -> None:
    """Removes a folder; several processes may do so at once."""
    try:
        buckets.remove(folder)
    except OSError as error:
        _log.debug("%s is not removed: %s", folder, error)


def move(source: Any, target: Any) -> None:
    """Moves the folder of a step."""
    if isinstance(source, Path):
        folders.move(source, target, last=COMMITTED)
    else:
        source.rename(target)
