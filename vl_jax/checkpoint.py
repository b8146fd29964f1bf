"""Checkpoints: orbax for the arrays, and beside them a JSON record with position and checksums.

    checkpoints/<step>/params     parameters alone, so that other programs can read just these
                      /training   optimiser and routing state
                      /record     JSON: stage, data position, dtype, shape and checksum of every leaf, a seal
                damaged/<step>    steps that could not be read, set aside when the run went on

A byte flipped on disk is restored silently by the storage layer, and a damaged step is still listed. So every
leaf has a checksum that does not depend on sharding, the record has one of its own (the seal), and restoring
falls back to the newest sound step. Saving is checked too: what says that it saved has.

A folder of a run whose workdir is in a bucket is there too: see ``runtime.storage``. How a step becomes whole
where folders cannot be renamed is there too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from vl_jax import params as params_lib
from vl_jax.runtime import late_writes
from vl_jax.runtime.checkpoint_record import (
    LEAVES,
    as_stored,
    damage,
    described,
    differences,
    infinite,
    is_sound,
    sealed,
    shapes,
)
from vl_jax.runtime.lazy_array import LazyArray
from vl_jax.runtime.lazy_storage import lazy_handler
from vl_jax.runtime.storage import buckets, commit, mirror

CHECKPOINTS = "checkpoints"  # the folder of a run or a conversion that holds them
DAMAGED = "damaged"  # below it, the steps that were set aside
_SMALL = 2**24  # bytes: an array of fewer is written by one device
# Seconds that writing may take. Orbax counts them by the time of day: a clock that is set forward, or a
# computer that slept, would end a save that has only begun. A run that stands still is the watchdog's.
_NO_BOUND = 10**9
logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used or written; the message says which and why, in one line."""


class NotFiniteError(CheckpointError):
    """A state that is not saved because it holds an infinite number or none."""


class OtherTreeError(CheckpointError):
    """A sound checkpoint that holds other leaves than are asked for; an older one would not help."""


@dataclasses.dataclass(frozen=True)
class _Retention:
    """Which steps stay when a new one is written; orbax asks."""

    newest: int
    every: int  # of steps, those that are a multiple of it; 0: none
    others: Callable[[], Collection[int]]

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*sorted(steps)[-self.newest :], *self.others()}
        kept |= {step for step in steps if self.every and step % self.every == 0}
        return [step in kept for step in steps]


class Checkpointer:
    """Saves asynchronously, restores the newest sound step."""

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 3,
        every: int = 0,
        others: Callable[[], Collection[int]] = tuple,
        lazy: bool = False,
        read_only: bool = False,
    ):
        """Opens or makes the folder.

        Args:
          keep: newest steps that stay.
          every: steps that are a multiple of it stay besides; 0: none do.
          others: gives the steps that stay besides.
          lazy: takes and gives back trees of ``LazyArray``, of which memory then holds pieces only. Their
            values may be infinite: nothing has computed them here.
          read_only: nothing will be saved, so nothing is tried out in the folder.
        """
        late_writes.hide()
        policy: Any = _Retention(keep, every, others)
        options = ocp.CheckpointManagerOptions(preservation_policy=policy, create=True)
        if jax.process_count() == 1:
            options.async_options = ocp.options.AsyncOptions(timeout_secs=_NO_BOUND)
        handler = lazy_handler if lazy else ocp.StandardCheckpointHandler
        handlers = {"params": handler(), "training": handler(), "record": ocp.JsonCheckpointHandler()}
        self._lazy, self._folder = lazy, buckets.beyond(folder)
        self._by_file = commit.by_file(self._folder, read_only=read_only)
        options.temporary_path_class = commit.path_class(self._by_file)
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)
        self._writing: tuple[int, int] | None = None  # step and bytes of what is on its way to disk
        logging.getLogger("absl").addFilter(self._says_more)

    @property
    def steps(self) -> list[int]:
        """The steps that are there, sound or not, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, *, params: Any, training: Any, record: Mapping[str, Any]) -> None:
        """Starts writing; the files follow in the background.

        Arrays are copied before this returns, lazy ones are read until everything is on disk.

        Raises:
          CheckpointError: this step or the one before could not be written, or an array is not finite.
        """
        self.wait()
        trees = {"params": params, "training": training}
        leaves, problem = described(trees)
        if problem and not self._lazy:
            raise NotFiniteError(f"step {step} is not saved: {problem}; {self._newest()}")
        record = sealed(step, {**record, **leaves})
        item = ocp.args.PyTreeSave if self._lazy else ocp.args.StandardSave
        args = ocp.args.Composite(
            **{name: item(jax.tree.map(_at_once, tree)) for name, tree in trees.items()},
            record=ocp.args.JsonSave(record),
        )
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
        # Of several processes each may have a disk of its own, for its part.
        if jax.process_count() == 1 and self._free() < needed:
            raise self._not_saved(step, needed)
        self._writing = step, needed
        mirror.push_above(self._folder)  # a log in a bucket is never behind a checkpoint
        with self._told():
            written = self._manager.save(step, args=args)
        if not written:
            self._writing = None
            raise CheckpointError(
                f"step {step} is not saved: {self._folder} holds step {max(self.steps)} already; move the "
                "steps from there on away"
            )

    def wait(self) -> None:
        """Returns when everything saved is on disk.

        Raises:
          CheckpointError: it could not be written.
        """
        with self._told():
            self._manager.wait_until_finished()
            step = None if self._writing is None else self._folder / str(self._writing[0])
            if step is not None and not commit.is_whole(step, by_a_file=self._by_file):
                raise FileNotFoundError(f"{step} is not whole")
        self._writing = None

    def close(self) -> None:
        """Finishes writing and releases the folder.

        Raises:
          CheckpointError: what was saved last could not be written.
        """
        try:
            self.wait()
        except CheckpointError:
            with contextlib.suppress(Exception):  # orbax raises the same again, after its parts are closed
                self._manager.close()
            self._remove_partial()
            raise
        else:  # Where saving failed, threads of orbax may say so once more, later.
            self._manager.close()
            logging.getLogger("absl").removeFilter(self._says_more)

    def restore(
        self,
        *,
        params: Any,
        training_of: Callable[[dict[str, Any]], Any],
        before: int | None = None,
        mend: bool = False,
    ) -> tuple[int, Any, Any, dict[str, Any]] | None:
        """The newest step that reads back soundly, as (step, params, training, record); None without steps.

        Args:
          params: abstract parameters with shardings; or what gives them from the record of a step. Floating
            leaves may be of another dtype than those saved, and become so once they are checked.
          training_of: from the record of a step to the abstract tree of its training state.
          before: only steps before this one.
          mend: sets the damaged steps aside, so that the run can write them again, and removes what was
            half written. Only for the one who trains: others may look while a step is being written.

        Raises:
          OtherTreeError: the newest sound step is of another model, optimiser or routing scheme.
          CheckpointError: there are checkpoints, and none of them is sound.
        """

        def wanted(step: int, record: dict[str, Any]) -> dict[str, Any]:
            trees = {"params": params(record) if callable(params) else params}
            trees["training"] = training_of(record)
            for item, tree in trees.items():
                stored = None if LEAVES in record else self._stored(step, item)
                if problem := differences(item, shapes(item, record, stored), tree):
                    if LEAVES not in record:
                        raise CheckpointError(problem)
                    raise OtherTreeError(f"step {step} of {self._folder} is of {problem}")
            return trees

        steps = [step for step in self.steps if before is None or step < before]
        return self._newest_sound(steps, wanted, mend=mend)

    def restore_stored(
        self,
        parts: Collection[str],
        *,
        only: int | None = None,
        chosen: Callable[[str], bool] = lambda path: True,
    ) -> tuple[int, Any, Any, dict[str, Any]] | None:
        """``restore``, whatever the newest step holds; of its training state the named parts alone.

        It gives lazy arrays, so the checkpointer has to be lazy.

        Args:
          only: this step, and no other.
          chosen: whether the parameter of a path is read, and checked.
        """

        def wanted(step: int, record: dict[str, Any]) -> dict[str, Any]:
            training = {k: v for k, v in self._stored(step, "training").items() if k in parts}
            flat = params_lib.flatten(self._stored(step, "params"))
            params = params_lib.unflatten({path: leaf for path, leaf in flat.items() if chosen(path)})
            return {"params": params, "training": training}

        steps = [step for step in self.steps if only is None or step == only]
        return self._newest_sound(steps, wanted, whole=False)

    def _stored(self, step: int, item: str) -> Any:
        """Shapes and dtypes as storage has them; containers are mappings and lists."""
        return self._manager.item_metadata(step)[item].tree

    def _newest_sound(
        self,
        steps: list[int],
        wanted: Callable[[int, dict[str, Any]], dict[str, Any]],
        *,
        mend: bool = False,
        whole: bool = True,
    ) -> tuple[int, Any, Any, dict[str, Any]] | None:
        problems: dict[int, str] = {}
        for step in reversed(steps):
            found = self._read(step, wanted, whole=whole)
            if not isinstance(found, str):
                places = self._set_aside(problems) if mend else {}
                for bad, problem in problems.items():
                    where = f"; set aside as {places[bad]}" if bad in places else ""
                    logger.warning("checkpoint skipped: step %d: %s%s", bad, problem, where)
                return step, *found
            problems[step] = found
        if problems:
            told = "; ".join(f"step {step}: {problem}" for step, problem in problems.items())
            raise CheckpointError(
                f"no checkpoint can be restored; {told}; move {self._folder} away to begin anew"
            )
        return None

    def _read(
        self, step: int, wanted: Callable[[int, dict[str, Any]], dict[str, Any]], *, whole: bool
    ) -> tuple[Any, Any, dict[str, Any]] | str:
        """Parameters, training state and record of a step, or why it cannot be used.

        Processes agree, before each computation that they share: files may be damaged on one alone.
        """
        record, trees, restored = {}, {}, {}
        try:
            only = ocp.args.Composite(record=ocp.args.JsonRestore())
            record = self._manager.restore(step, args=only)["record"]
            if not is_sound(step, record):
                raise CheckpointError(f"the record of step {step} differs from its checksum")
            trees = {item: tree for item, tree in wanted(step, record).items() if tree}
            stored = {
                item: tree if self._lazy else _stored_as(item, record, tree) for item, tree in trees.items()
            }
            args = {item: self._target(tree, whole=whole) for item, tree in stored.items()}
            restored = self._manager.restore(step, args=ocp.args.Composite(**args))
            problem = ""
        except OtherTreeError:
            raise
        except CheckpointError as error:
            problem = str(error)
        except Exception as error:  # storage raises many kinds; each means "this step cannot be read"
            problem = _cause(error)
        problem = _agreed(problem) or _agreed(self._damage(record, {i: restored[i] for i in trees}, whole))
        if problem:
            return problem
        if not self._lazy:
            restored = {item: _cast(restored[item], tree) for item, tree in trees.items()}
        return restored["params"], restored["training"] if "training" in trees else {}, record

    def _damage(self, record: Mapping[str, Any], trees: Mapping[str, Any], whole: bool) -> str:
        try:  # lazy arrays are read here
            found = (damage(item, record, tree, whole=whole) for item, tree in trees.items())
            problem = next(filter(None, found), "")
            return problem or ("" if self._lazy else infinite(trees["params"]))
        except Exception as error:
            return _cause(error)

    def _set_aside(self, steps: Collection[int]) -> dict[int, Path]:
        """Renames damaged steps and removes half-written ones; where each damaged one is now."""
        places = {}
        for step in steps:
            place, again = self._folder / DAMAGED / str(step), 1
            while place.exists():
                place, again = self._folder / DAMAGED / f"{step}-{again}", again + 1
            places[step] = place
        if jax.process_index() == 0:
            for step, place in places.items():
                place.parent.mkdir(exist_ok=True)
                commit.move(self._folder / str(step), place)
            self._remove_partial()
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        self._manager.reload()
        return places

    def _remove_partial(self) -> None:
        """Removes what was half written; several processes may do so at once."""
        for partial in commit.unfinished(self._folder, by_a_file=self._by_file):
            commit.remove(partial)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turns what fails in writing, here or in the background, into one line, and leaves no part of it."""
        try:
            yield
        except Exception as error:
            if self._writing is None:
                raise
            step, needed = self._writing
            self._writing = None
            self._remove_partial()
            self._manager.reload()
            raise self._not_saved(step, needed, _cause(error)) from error

    def _not_saved(self, step: int, needed: int, cause: str = "") -> CheckpointError:
        free = self._free()
        remedy = "make room" if free < needed else "put this right"
        room = "" if math.isinf(free) else f", {_size(free)} are free"
        return CheckpointError(
            f"step {step} is not saved in {self._folder}: it needs {_size(needed)}{room}; "
            f"{self._newest()}; {remedy} and run again{f' ({cause})' if cause else ''}"
        )

    def _free(self) -> float:
        """Bytes that are free; a bucket has no bound."""
        return shutil.disk_usage(self._folder).free if isinstance(self._folder, Path) else math.inf

    def _says_more(self, record: logging.LogRecord) -> bool:
        """Whether orbax logs something else than an exception, which it raises besides."""
        return record.exc_info is None

    def _newest(self) -> str:
        return (
            f"the newest checkpoint is of step {max(self.steps)}" if self.steps else "there is no checkpoint"
        )

    def _target(self, tree: Any, *, whole: bool) -> ocp.args.CheckpointArgs:
        if not self._lazy:
            return ocp.args.StandardRestore(tree)
        each = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=LazyArray), tree)
        return ocp.args.PyTreeRestore(tree, restore_args=each, partial_restore=not whole)


def _at_once(x: Any) -> Any:
    """Of a small array that all devices hold whole, one copy.

    Orbax would have each device write a part of its copy, and compile a program for every such part.
    """
    if not isinstance(x, jax.Array) or x.nbytes >= _SMALL or jax.process_count() > 1:
        return x
    return x.addressable_data(0) if x.is_fully_replicated else x


def _stored_as(item: str, record: Mapping[str, Any], wanted: Any) -> Any:
    try:
        return as_stored(item, record, wanted)
    except ValueError as error:
        raise OtherTreeError(f"{item}: {error}") from None


def _cast(tree: Any, wanted: Any) -> Any:
    """The tree in the dtypes wanted, one array after the other; one that is replaced is let go."""

    def cast(x: jax.Array, like: Any) -> jax.Array:
        if x.dtype == like.dtype:
            return x
        made = jax.jit(lambda x: x.astype(like.dtype), out_shardings=like.sharding)(x)
        jax.block_until_ready(made)
        x.delete()
        return made

    return jax.tree.map(cast, tree, wanted)


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _agreed(problem: str) -> str:
    """The problem of this process, or that another one has one."""
    if jax.process_count() == 1:
        return problem
    bad = np.flatnonzero(multihost_utils.process_allgather(np.int32(bool(problem))))
    return problem or (f"process {bad[0]} cannot use it" if bad.size else "")


def _size(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
