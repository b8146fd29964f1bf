"""Listening: what a run's heads say of a long sound or series while it is read, chunk by chunk.

    file |=======|=======|===|   -->   Heard(0.5 s, {"label": {"seven": 0.8, ...}}, 3.1 ms), Heard(1.0 s, ...)

A head says it of all so far where its tower pools ``last``, of the chunk where it pools ``mean``.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vl_jax.api.calls import load_run
from vl_jax.api.run import Run
from vl_jax.data.media.chunks import chunks_of
from vl_jax.data.sample import BadSample
from vl_jax.encoders.streaming import StreamingConfig
from vl_jax.fusion.build import Apart
from vl_jax.joint import Joint, Tower
from vl_jax.runtime import errors, start
from vl_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Heard:
    """What was said after a chunk."""

    steps: int  # that were read so far
    said: dict[str, Any]  # by head, as ``predict`` says it
    latency_ms: float  # from the chunk to what was said of it; the program is compiled before the first


def listen(
    run: Run | str | PathLike[str], file: str | PathLike[str], *, steps: int, tower: str = ""
) -> Iterator[Heard]:
    """Reads a file in chunks, and gives what the heads of a tower say after each.

    Args:
      run: an open run (see ``load_run``), or its folder.
      file: a sound at the rate of the tower, or an NPY file [t c].
      steps: of a chunk: samples of a sound, steps of a series.
      tower: that reads it; empty: the only one that reads in chunks.

    Raises:
      UserError: no tower of the run reads in chunks, no head reads that tower alone, or the file cannot be
        read.
    """
    start.set_up()
    opened = run if isinstance(run, Run) else load_run(run)
    with errors.told():
        chosen = _tower(opened, tower)
        encoder: Any = chosen.encoder
        if steps < 1 or steps % encoder.chunk:
            rule = f"a chunk of tower {chosen.name!r} has a multiple of {encoder.chunk} steps"
            raise UserError(f"steps={steps}: {rule}")
        state = encoder.begin(1)
        heads = [head for head in opened.layout.model.config.heads if head.inputs == (chosen.name,)]
        if not heads:
            raise UserError(f"no head reads tower {chosen.name!r} alone, so none can say anything in chunks")
        hear = _compiled(opened, chosen, steps, state)
    yield from _heard(opened, chosen, Path(file), steps, state, hear, heads)


def _tower(run: Run, name: str) -> Tower:
    model = run.layout.model
    towers = model.config.towers if isinstance(model, Joint) else ()
    if isinstance(model, Joint) and not isinstance(model.config.fusion, Apart):
        kind = type(model.config.fusion).__name__
        raise UserError(f"{run.workdir}: its heads read what {kind} makes of all towers, not one in chunks")
    able = {t.name: t for t in towers if isinstance(t.encoder, StreamingConfig)}
    if name not in able and (name or len(able) != 1):
        raise UserError(f"tower={name!r}: towers that read in chunks: {', '.join(able) or 'none'}")
    return able[name] if name else next(iter(able.values()))


def _compiled(run: Run, tower: Tower, steps: int, state: Any) -> Any:
    """The program of one chunk."""
    model = run.layout.model
    hear = jax.jit(functools.partial(model.apply, method="hear", tower=tower.name))
    chunk = jnp.zeros((1, steps, *tower.encoder.input_shape[1:]), jnp.float32)
    valid = jnp.ones((1, steps), bool)
    variables = {"params": run.params, **run.state.collections}
    hear = functools.partial(hear, variables)
    jax.block_until_ready(hear(chunk, state, valid))  # so that the first chunk waits for no compiler
    return hear


def _heard(
    run: Run, tower: Tower, file: Path, steps: int, state: Any, hear: Any, heads: list[Any]
) -> Iterator[Heard]:
    encoder: Any = tower.encoder
    rate = encoder.audio.sample_rate if hasattr(encoder, "audio") else None
    silence = (np.zeros((steps, *encoder.input_shape[1:]), np.float32), 0)
    pieces, read = chunks_of(file, steps, rate=rate), 0
    left = -(-encoder.delay // steps)
    while True:
        with errors.told():
            try:
                piece = next(pieces, None)
            except BadSample as error:
                raise UserError(str(error)) from None
            if piece is None and not left:
                return
            left -= piece is None
            values, count = silence if piece is None else piece
            begun = time.perf_counter()
            valid = np.arange(steps)[None] < count
            predictions, state = hear(jnp.asarray(values[None]), state, jnp.asarray(valid))
            predictions = jax.device_get(predictions)
            took = (time.perf_counter() - begun) * 1e3
        read += count
        yield Heard(read, {head.name: _said(head, predictions[head.name]) for head in heads}, took)


def _said(head: Any, prediction: Any) -> Any:
    row = jax.tree.map(lambda x: np.asarray(x)[0], prediction)
    return head.probabilities(row) if hasattr(head, "probabilities") else head.decode(row)
