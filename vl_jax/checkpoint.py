"""Checkpoints: orbax for the arrays, and beside them a JSON record with position and checksums.

    checkpoints/<step>/params     parameters alone, so that other programs can read just these
                      /training   optimiser and routing state
                      /record     JSON: stage, data position, checksum of every leaf

A byte flipped on disk is restored silently by the storage layer, and a damaged step is still listed; so every
leaf carries a checksum that does not depend on sharding, and restoring falls back to the newest sound step.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from vl_jax import params as params_lib

logger = logging.getLogger(__name__)

_PIECE = 1 << 20  # items summed at a time
_SLACK = 1 << 20  # bytes by which a limit must exceed what is asked for


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


def _checksum_on_host(x: Any) -> int:
    """The same of an array in host memory, a piece at a time: compiled for a CPU, it holds all products."""
    bits, total = np.asarray(x).reshape(-1).view(f"u{x.dtype.itemsize}"), 0
    for start in range(0, bits.size, _PIECE):
        piece = bits[start : start + _PIECE].astype(np.uint32)
        first = 2 * start % 2**32 + 1
        weights = np.arange(0, 2 * len(piece), 2, dtype=np.uint32) + np.uint32(first)
        total += int((piece * weights).sum(dtype=np.uint32))
    return total % 2**32


def checksums(tree: Any) -> dict[str, int]:
    """A checksum per leaf of a tree of 1-, 2- or 4-byte arrays, the same for every sharding."""
    named, _ = jax.tree_util.tree_flatten_with_path(tree)
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in named}
    host = {name: _checksum_on_host(x) for name, x in leaves.items() if _in_one_piece(x)}
    others = [name for name in leaves if name not in host]
    if others:
        values = jax.device_get(_checksums([leaves[name] for name in others]))
        host |= {name: int(v) for name, v in zip(others, values, strict=True)}
    return host


def _in_one_piece(x: Any) -> bool:
    """Whether an array lies in host memory as a whole."""
    places = x.devices() if isinstance(x, jax.Array) else ()
    return len(places) < 2 and all(device.platform == "cpu" for device in places)


class Checkpointer:
    """Saves asynchronously, restores the newest sound step."""

    def __init__(self, folder: Path, *, keep: int = 3, in_flight: int | None = None):
        """Opens or makes the folder.

        Args:
          keep: steps that stay.
          in_flight: bytes that may be on their way to or from the disk at a time, at least those of the
            largest leaf; leaves then have files of their own. None: as many as there are, which is quickest,
            and takes as much memory again as the arrays.
        """
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        limits: dict[str, Any] = {}
        if in_flight is not None:
            gigabytes = (in_flight + _SLACK) / 1e9
            # The data base in which leaves are stored otherwise collects them in memory before it writes.
            limits = {"save_concurrent_gb": gigabytes, "restore_concurrent_gb": gigabytes, "use_ocdbt": False}
        handlers = {
            "params": ocp.StandardCheckpointHandler(**limits),
            "training": ocp.StandardCheckpointHandler(**limits),
            "record": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handlers)

    def save(self, step: int, *, params: Any, training: Any, record: dict[str, Any]) -> None:
        """Starts writing; the arrays are copied before this returns, the files follow in the background."""
        sums = {"params": checksums(params), "training": checksums(training)}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                training=ocp.args.StandardSave(training),
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
                args = ocp.args.Composite(
                    params=ocp.args.StandardRestore(params), training=ocp.args.StandardRestore(training)
                )
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

    def record(self) -> dict[str, Any]:
        """The record of the newest step, without its arrays.

        Raises:
          CheckpointError: there is no step, or its record cannot be read.
        """
        step = self._manager.latest_step()
        if step is None:
            raise CheckpointError("the folder holds no checkpoint")
        try:
            return self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))[
                "record"
            ]
        except Exception as error:  # storage raises many kinds; each means "this step cannot be read"
            raise CheckpointError(f"step {step}: {type(error).__name__}: {error}") from None

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
