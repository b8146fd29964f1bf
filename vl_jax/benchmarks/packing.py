"""How many tokens a second an experiment trains in packed rows, beside one sample and one question a row.

    batches of packed rows --step--> ...
    batches of as many samples, one a row --step--> ...      in turns, in this process, with the same model
    batches of as many questions, one a row --step--> ...

Tokens are those of samples: padding counts for nothing. Answers are tokens that are predicted: where the
questions of a sample share its pictures, rows of one question repeat the pictures' tokens, and only those of
answers say how much was learned from. Batches are made before the clock starts.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vl_jax import sharding
from vl_jax.batch import Batch
from vl_jax.benchmarks.step import machine, spread
from vl_jax.experiment import Experiment, first_weights, open_stream, plan
from vl_jax.layout import Layout, put_batch, rows_here
from vl_jax.runtime import allocator
from vl_jax.train.program import Program

BATCHES = 6  # that are made; steps take them in turns
STEPS = 4  # of a turn
SAMPLE, QUESTION = "one sample a row", "one question a row"
COUNTED, CLOCKS = ("tokens", "answers"), ("cpu", "wall")


class Training:
    """The last stage of an experiment, ready to take steps."""

    def __init__(self, experiment: Experiment):
        stage = dataclasses.replace(experiment.stages[-1], lora=None, accumulation=1)
        self.layout = layout = plan(experiment)
        stream = open_stream(experiment, stage, rows_here(layout, stage.batch_size))
        try:
            self.batches = [next(stream) for _ in range(BATCHES)]
        finally:
            stream.close()
        self._program = Program.of(layout, stage)
        self._state = self._program.begin(first_weights(experiment, layout), jax.random.key(0))
        self._taken, self._rate = 0, np.float32(stage.optimizer.learning_rate)

    @property
    def samples(self) -> float:
        """Of a batch, on average."""
        return float(np.mean([b.segment_ids.max(axis=1).sum() for b in self.batches]))

    @property
    def questions(self) -> float:
        """Of a batch, on average: the branches of samples on which something is predicted."""
        return float(np.mean([_questions(batch) for batch in self.batches]))

    def advance(self, steps: int) -> np.ndarray:
        """Takes so many steps; the tokens of samples that they trained on, and those that were predicted."""
        done = np.zeros(2, np.int64)
        with sharding.use_mesh(self.layout.mesh, self.layout.rules):
            for _ in range(steps):
                batch = self.batches[self._taken % BATCHES]
                on_device = put_batch(batch, self.layout)
                self._state, _ = self._program.step(self._state, on_device, self._rate)
                self._taken += 1
                done += np.count_nonzero(batch.segment_ids), np.count_nonzero(batch.loss_weights)
            jax.block_until_ready(self._state)
        return done

    def facts(self) -> dict[str, float]:
        """The shape of a batch, and how full it is."""
        rows, length = self.batches[0].tokens.shape
        used = np.mean([np.count_nonzero(b.segment_ids) for b in self.batches])
        return {
            "rows": rows,
            "row_tokens": length,
            "row_tiles": self.batches[0].tiles.shape[1],
            "samples": self.samples,
            "questions": self.questions,
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
    ways = {"packed": packed, SAMPLE: Training(_unpacked(experiment, packed.layout, packed.samples))}
    data, conversation = experiment.data, experiment.data.conversation
    if conversation.turns == "independent" and conversation.max_turns != 1:
        single = dataclasses.replace(data, conversation=dataclasses.replace(conversation, max_turns=1))
        alone = dataclasses.replace(experiment, data=single)
        ways[QUESTION] = Training(_unpacked(alone, packed.layout, packed.questions))
    turns: dict[str, list[np.ndarray]] = {name: [] for name in ways}
    for turn in range(repeats + 1):  # the first compiles
        for name, training in ways.items():
            cpu, wall = time.process_time(), time.perf_counter()
            done = training.advance(STEPS)
            spent = time.process_time() - cpu, time.perf_counter() - wall
            if turn:
                turns[name].append(done[:, None] / np.asarray(spent))
    speeds = {name: np.stack(each) for name, each in turns.items()}  # [turn, tokens or answers, CPU or wall]
    # Where an accelerator computes, CPU time says nothing.
    clock = CLOCKS.index("cpu" if jax.default_backend() == "cpu" else "wall")
    result = {
        "benchmark": "packing",
        "unit": "per second",
        "repeats": repeats,
        "machine": machine(),
        "ways": {
            name: {
                **training.facts(),
                **{
                    f"{what}_{by}": spread(speeds[name][:, i, j].tolist())
                    for i, what in enumerate(COUNTED)
                    for j, by in enumerate(CLOCKS)
                },
            }
            for name, training in ways.items()
        },
        "ratios": {
            name: {
                what: spread((speeds["packed"][:, i, clock] / speeds[name][:, i, clock]).tolist())
                for i, what in enumerate(COUNTED)
            }
            for name in ways
            if name != "packed"
        },
    }
    print(table(result))
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _unpacked(experiment: Experiment, layout: Layout, rows: float) -> Experiment:
    """The experiment with one sample a row, and so many rows, the same number on every data shard."""
    shards = sharding.batch_axes(layout.mesh)
    whole = max(1, round(rows / shards)) * shards
    stages = (*experiment.stages[:-1], dataclasses.replace(experiment.stages[-1], batch_size=whole))
    return dataclasses.replace(
        experiment, data=dataclasses.replace(experiment.data, packing=None), stages=stages
    )


def _questions(batch: Batch) -> int:
    predicted = np.asarray(batch.loss_weights) > 0
    rows = np.broadcast_to(np.arange(len(predicted))[:, None], predicted.shape)
    ids = (np.take_along_axis(ids, batch.target_index, 1) for ids in (batch.segment_ids, batch.branch_ids))
    return len(np.unique(np.stack([rows, *ids], -1)[predicted], axis=0))


def table(result: Mapping[str, Any]) -> str:
    """The figures as text."""
    lines = [
        f"{result['unit']}, median of {result['repeats']} turns",
        f"{'':20}{'rows':>6}{'tokens':>8}{'tiles':>7}{'samples':>9}{'questions':>11}{'used':>7}"
        f"{'tokens/CPU s':>14}{'answers/CPU s':>15}{'tokens/s':>10}{'answers/s':>11}",
    ]
    for name, way in result["ways"].items():
        lines.append(
            f"{name:20}{way['rows']:6}{way['row_tokens']:8}{way['row_tiles']:7}{way['samples']:9.1f}"
            f"{way['questions']:11.1f}{way['used']:7.0%}"
            f"{way['tokens_cpu']['median']:14.0f}{way['answers_cpu']['median']:15.0f}"
            f"{way['tokens_wall']['median']:10.0f}{way['answers_wall']['median']:11.0f}"
        )
    for name, ratios in result["ratios"].items():
        figures = (
            "{}: {median:.2f} ({lowest:.2f} - {highest:.2f})".format(what, **ratio)
            for what, ratio in ratios.items()
        )
        lines.append(f"packed / {name}, {', '.join(figures)}")
    return "\n".join(lines)
