"""Checkpoints: orbax for the arrays, and beside them a JSON record with position and checksums.

    checkpoints/<step>/params     parameters alone, so that other programs can read just these
                      /training   optimiser and routing state
                      /record     JSON: stage, data position, checksum of every leaf

A byte flipped on disk is restored silently by the storage layer, and a damaged step is still listed; so every
leaf carries a checksum that does not depend on sharding, and restoring falls back to the newest sound step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from orbax.checkpoint import future

from vl_jax import params as params_lib
from vl_jax.runtime.lazy_array import Index, LazyArray

CHECKPOINTS = "checkpoints"  # the folder of a run or a conversion that holds them
logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says which and why, in one line."""


@jax.jit
def _checksums(leaves: list[jax.Array]) -> jax.Array:
    """One uint32 per leaf: sum of bits times odd weights, modulo 2**32, in whatever order."""

    def one(x: jax.Array) -> jax.Array:
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32).reshape(-1)
        weights = jax.lax.iota(jnp.uint32, bits.size) * jnp.uint32(2) + jnp.uint32(1)
        return jnp.sum(bits * weights, dtype=jnp.uint32)

    return jnp.stack([one(x) for x in leaves])


def _checksum_on_host(array: LazyArray) -> int:
    """The same of an array in host memory, by pieces: compiled for a CPU, it holds all products."""
    total = offset = 0
    for index in array.pieces():
        bits = array[index].reshape(-1).view(f"u{array.dtype.itemsize}").astype(np.uint32)
        weights = np.arange(0, 2 * bits.size, 2, dtype=np.uint32) + np.uint32((2 * offset + 1) % 2**32)
        total += int(np.multiply(bits, weights, out=bits).sum(dtype=np.uint32))
        offset += bits.size
    return total % 2**32


def checksums(tree: Any) -> dict[str, int]:
    """A checksum per leaf of a tree of 1-, 2- or 4-byte arrays, the same for every sharding."""
    named, _ = jax.tree_util.tree_flatten_with_path(tree)
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in named}
    here = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, LazyArray)}
    here |= {
        name: LazyArray.of(np.asarray(leaf))
        for name, leaf in leaves.items()
        if name not in here and _in_one_piece(leaf)
    }
    sums = {name: _checksum_on_host(array) for name, array in here.items()}
    others = [name for name in leaves if name not in sums]
    if others:
        values = jax.device_get(_checksums([leaves[name] for name in others]))
        sums |= {name: int(v) for name, v in zip(others, values, strict=True)}
    return sums


def _in_one_piece(x: Any) -> bool:
    """Whether an array lies in host memory as a whole."""
    places = x.devices() if isinstance(x, jax.Array) else ()
    return len(places) < 2 and all(device.platform == "cpu" for device in places)


class _LazyArrayHandler(ocp.type_handlers.ArrayHandler):
    """How orbax stores and restores lazy arrays: as if each had been sharded into its pieces."""

    async def serialize(
        self, values: Sequence[LazyArray], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[future.Future]:
        written = self._write(values, infos)
        return [future.CommitFutureAwaitingContractedSignals(written, name="lazy_array")]

    async def _write(self, values: Sequence[LazyArray], infos: Sequence[Any]) -> None:
        for array, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            spec = ocp.type_handlers.get_json_tspec_write(
                info,
                use_ocdbt=info.is_ocdbt_checkpoint,
                global_shape=array.shape,
                local_shape=array.piece,
                dtype=array.dtype,
            )
            store = await tensorstore.open(spec, create=True, open=True, context=info.ts_context)
            for index in array.pieces():
                await store[index].write(array[index])

    async def deserialize(self, infos: Sequence[Any], args: Sequence[Any] | None = None) -> list[LazyArray]:
        reads = [ocp.type_handlers.get_json_tspec_read(i, use_ocdbt=i.is_ocdbt_checkpoint) for i in infos]
        given = infos[0].ts_context
        stores = [await tensorstore.open(spec, open=True, context=given) for spec in reads]
        # A reader whose windows are other than the chunks on disk meets each chunk again: two stay decoded.
        chunks = [(s.chunk_layout.read_chunk_template.shape, s.dtype.numpy_dtype.itemsize) for s in stores]
        most = 2 * max(math.prod(shape) * itemsize for shape, itemsize in chunks)
        cached = tensorstore.Context.Spec({"cache_pool": {"total_bytes_limit": most}})
        context = tensorstore.Context(cached, parent=given)
        stores = [await tensorstore.open(spec, open=True, context=context) for spec in reads]
        return [LazyArray(tuple(s.shape), s.dtype.numpy_dtype, partial(_read, s)) for s in stores]


def _read(store: Any, index: Index) -> np.ndarray:
    """A part of a stored array, read by pieces: at once, it would be in memory as it is on disk as well."""
    window = store[index][tensorstore.d[:].translate_to[0]]
    result = np.empty(window.shape, window.dtype.numpy_dtype)
    for part in LazyArray.of(result).pieces():
        result[part] = window[part].read().result()
    return result


def _lazy_handler() -> ocp.PyTreeCheckpointHandler:
    """The handler of a tree of lazy arrays, which on disk are a ``jax.Array`` each.

    Each array has files of its own: the data base that orbax takes otherwise collects in memory what it is
    given, and writes it at the end.
    """
    handler = _LazyArrayHandler()
    registry = ocp.type_handlers.create_type_handler_registry((LazyArray, handler), (jax.Array, handler))
    return ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)


class Checkpointer:
    """Saves asynchronously, restores the newest sound step."""

    def __init__(self, folder: Path, *, keep: int = 3, lazy: bool = False):
        """Opens or makes the folder.

        Args:
          keep: steps that stay.
          lazy: takes and gives back trees of ``LazyArray``, of which memory then holds pieces only.
        """
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        handler = _lazy_handler if lazy else ocp.StandardCheckpointHandler
        handlers = {"params": handler(), "training": handler(), "record": ocp.JsonCheckpointHandler()}
        self._lazy = lazy
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handlers)

    def save(self, step: int, *, params: Any, training: Any, record: dict[str, Any]) -> None:
        """Starts writing; the files follow in the background.

        Arrays are copied before this returns, lazy ones are read until everything is on disk.
        """
        item = ocp.args.PyTreeSave if self._lazy else ocp.args.StandardSave
        sums = {"params": checksums(params), "training": checksums(training)}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=item(params),
                training=item(training),
                record=ocp.args.JsonSave({**record, "checksums": sums}),
            ),
        )

    def restore(
        self, *, params: Any, training_of: Any, before: int | None = None
    ) -> tuple[int, Any, Any, dict[str, Any]] | None:
        """The newest step that reads back soundly, as (step, params, training, record); None without steps.

        Args:
          params: abstract parameters with shardings.
          training_of: from the record of a step to the abstract tree of its training state.
          before: only steps before this one.

        Raises:
          CheckpointError: there are checkpoints, and none of them is sound.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        steps = [step for step in steps if before is None or step < before]
        problems = []
        for step in steps:
            try:
                only_record = ocp.args.Composite(record=ocp.args.JsonRestore())
                record = self._manager.restore(step, args=only_record)["record"]
                training = training_of(record)
                _check_shapes(self._manager.item_metadata(step)["params"], params)
                args = ocp.args.Composite(params=self._target(params), training=self._target(training))
                restored = self._manager.restore(step, args=args)
                _verify(restored, record["checksums"])
            except CheckpointError as error:
                problems.append(f"step {step}: {error}")
            except Exception as error:  # storage raises many kinds; each means "this step cannot be read"
                problems.append(f"step {step}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
            else:
                for problem in problems:
                    logger.warning("checkpoint skipped: %s", problem)
                return step, restored["params"], restored["training"], record
        if problems:
            raise CheckpointError("no checkpoint can be restored; " + "; ".join(problems))
        return None

    def _target(self, tree: Any) -> ocp.args.CheckpointArgs:
        if not self._lazy:
            return ocp.args.StandardRestore(tree)
        each = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=LazyArray), tree)
        return ocp.args.PyTreeRestore(tree, restore_args=each)

    def wait(self) -> None:
        """Returns when everything saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes writing and releases the folder."""
        self._manager.wait_until_finished()
        self._manager.close()


def _check_shapes(stored: Any, wanted: Any) -> None:
    """Compares what a step holds with what the model needs, before any array is read."""
    have = {p: tuple(leaf.shape) for p, leaf in params_lib.flatten(stored.tree).items()}
    need = {p: tuple(leaf.shape) for p, leaf in params_lib.flatten(wanted).items()}
    differences = [
        f"{p} is {have.get(p, 'absent')} in the checkpoint, {need.get(p, 'absent')} in the model"
        for p in sorted(have.keys() | need.keys())
        if have.get(p) != need.get(p)
    ]
    if differences:
        more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
        raise CheckpointError("another model: " + "; ".join(differences[:3]) + more)


def _verify(restored: Any, sums: dict[str, dict[str, int]]) -> None:
    for item, expected in sums.items():
        actual = checksums(restored[item])
        damaged = sorted(k for k in expected if actual.get(k) != expected[k])
        if damaged or actual.keys() != expected.keys():
            raise CheckpointError(f"checksum of {item} differs at {', '.join(damaged[:3])}")
