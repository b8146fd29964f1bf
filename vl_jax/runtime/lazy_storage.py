"""How orbax stores lazy arrays, and gives them back.

LazyArray --_LazyArrayHandler--> files of a checkpoint --> LazyArray
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from orbax.checkpoint import future

from vl_jax.runtime.lazy_array import Index, LazyArray


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


def lazy_handler() -> ocp.PyTreeCheckpointHandler:
    """The handler of a tree of lazy arrays, which on disk are a ``jax.Array`` each.

    Each array has files of its own: the data base that orbax takes otherwise collects in memory what it is
    given, and writes it at the end.
    """
    handler = _LazyArrayHandler()
    registry = ocp.type_handlers.create_type_handler_registry((LazyArray, handler), (jax.Array, handler))
    return ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
