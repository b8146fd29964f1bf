"""How many tokens a second an experiment trains in packed rows, beside one sample a row.

    batches of packed rows --step--> ...   in turns, in this process, with the same model and
    batches of as many samples, one a row --step--> ...   as many samples a step

Tokens are those of samples: padding counts for nothing. Batches are made before the clock starts.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vl_jax import allocator, sharding
from vl_jax import params as params_lib
from vl_jax.benchmark import machine, spread
from vl_jax.experiment import Experiment, first_weights, open_stream, plan
from vl_jax.layout import put_batch, rows_here
from vl_jax.train.optimizer import make_optimizer
from vl_jax.train.stages import trainable_paths
from vl_jax.train.step import TrainState, make_train_step, split_trained

BATCHES = 6  # that are made; steps take them in turns
STEPS = 4  # of a turn


class Training:
    """The last stage of an experiment, ready to take steps."""

    def __init__(self, experiment: Experiment):
        stage = dataclasses.replace(experiment.stages[-1], lora=None)
        self.layout = layout = plan(experiment)
        stream = open_stream(experiment, stage, rows_here(layout, stage.batch_size))
        try:
            self.batches = [next(stream) for _ in range(BATCHES)]
        finally:
            stream.close()
        paths = trainable_paths(stage, layout.params)
        optimizer = make_optimizer(stage.optimizer, paths, set(params_lib.flatten(layout.params)))
        with sharding.use_mesh(layout.mesh, layout.rules):
            params, routing = first_weights(experiment, layout)
            moments = optimizer.init(split_trained(params, {}, paths)[0])
            self._state = TrainState(jnp.zeros((), jnp.int32), params, moments, routing)
            self._step = jax.jit(make_train_step(layout.model, optimizer, trainable=paths), donate_argnums=0)
        self._taken, self._rate = 0, np.float32(stage.optimizer.learning_rate)

    @property
    def samples(self) -> float:
        """Of a batch, on average."""
        return float(np.mean([b.segment_ids.max(axis=1).sum() for b in self.batches]))

    def advance(self, steps: int) -> int:
        """Takes so many steps; the tokens of samples that they trained on."""
        tokens = 0
        with sharding.use_mesh(self.layout.mesh, self.layout.rules):
            for _ in range(steps):
                batch = self.batches[self._taken % BATCHES]
                self._state, _ = self._step(self._state, put_batch(batch, self.layout), self._rate)
                self._taken += 1
                tokens += int(np.count_nonzero(batch.segment_ids))
            jax.block_until_ready(self._state)
        return tokens

    def facts(self) -> dict[str, float]:
        """The shape of a batch, and how full it is."""
        rows, length = self.batches[0].tokens.shape
        used = np.mean([np.count_nonzero(b.segment_ids) for b in self.batches])
        return {
            "rows": rows,
            "row_tokens": length,
            "row_tiles": self.batches[0].tiles.shape[1],
            "samples": self.samples,
            "used": float(used / (rows * length)),
        }


def run(experiment: Experiment, *, repeats: int = 9, json_file: Path | None = None) -> dict[str, Any]:
    """Measures, prints a table, and returns the figures.

    Raises:
      ValueError: there are no repeats, or the experiment does not pack its rows.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: must be at least 1")
    if experiment.data.packing is None:
        raise ValueError(
            "config.data.packing=None: say how rows are packed, such as --config.data.packing.max_tokens=512"
        )
    allocator.keep_freed_memory()
    packed = Training(experiment)
    ways = {"packed": packed, "one sample a row": Training(_unpacked(experiment, packed))}
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(repeats + 1):  # the first compiles
        for name, training in ways.items():
            cpu, wall = time.process_time(), time.perf_counter()
            tokens = training.advance(STEPS)
            spent = time.process_time() - cpu, time.perf_counter() - wall
            if turn:
                turns[name].append((tokens / spent[0], tokens / spent[1]))
    # Where an accelerator computes, CPU time says nothing.
    clock = 0 if jax.default_backend() == "cpu" else 1
    ratios = [a[clock] / b[clock] for a, b in zip(*turns.values(), strict=True)]
    result = {
        "benchmark": "packing",
        "unit": "tokens per second",
        "repeats": repeats,
        "machine": machine(),
        "ways": {
            name: {
                **training.facts(),
                "cpu": spread([cpu for cpu, _ in turns[name]]),
                "wall": spread([wall for _, wall in turns[name]]),
            }
            for name, training in ways.items()
        },
        "ratio": spread(ratios),
    }
    print(table(result))
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _unpacked(experiment: Experiment, packed: Training) -> Experiment:
    """The experiment with one sample a row and as many samples, the same number on every data shard."""
    shards = sharding.batch_axes(packed.layout.mesh)
    rows = max(1, round(packed.samples / shards)) * shards
    stages = (*experiment.stages[:-1], dataclasses.replace(experiment.stages[-1], batch_size=rows))
    return dataclasses.replace(
        experiment, data=dataclasses.replace(experiment.data, packing=None), stages=stages
    )


def table(result: Mapping[str, Any]) -> str:
    """The figures as text."""
    lines = [
        f"{result['unit']}, median of {result['repeats']} turns",
        f"{'':18}{'rows':>6}{'tokens':>8}{'tiles':>7}{'samples':>9}{'used':>7}{'CPU':>9}{'wall':>9}",
    ]
    for name, way in result["ways"].items():
        lines.append(
            f"{name:18}{way['rows']:6}{way['row_tokens']:8}{way['row_tiles']:7}{way['samples']:9.1f}"
            f"{way['used']:7.0%}{way['cpu']['median']:9.0f}{way['wall']['median']:9.0f}"
        )
    lines.append(
        "packed / one sample a row: {median:.2f} ({lowest:.2f} - {highest:.2f})".format(**result["ratio"])
    )
    return "\n".join(lines)
