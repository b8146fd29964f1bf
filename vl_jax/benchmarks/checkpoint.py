"""How long saving a checkpoint holds up the training step, beside the step itself.

    step, step, save (what holds up is timed), wait until it is on disk ...      in turns, in this process

What holds up: reading the state once for its checksums and for what is not finite, and copying it. Writing
goes on in the background, and is timed apart. The model has 100 million parameters, of which AdamW keeps two
moments.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from vl_jax import params as params_lib
from vl_jax import sharding
from vl_jax.benchmarks.step import MODEL, Case, machine, spread, text_batch, text_model
from vl_jax.checkpoint import Checkpointer
from vl_jax.layout import put_batch
from vl_jax.roles import ORDINARY
from vl_jax.runtime.checkpoint_record import described
from vl_jax.train.optimizer import OptimizerConfig, make_optimizer
from vl_jax.train.step import TrainState, make_train_step

SIZES = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 7, "moe_intermediate_size": 384}
CLOCKS = ("cpu", "wall")
Times = tuple[float, float]  # CPU and wall seconds


def run(*, repeats: int = 5, json_file: Path | None = None, case: Case | None = None) -> dict[str, Any]:
    """Measures, prints a table and returns the figures.

    Args:
      repeats: saves; each comes after two steps.
      json_file: where the figures go too.
    """
    case = case or Case(model={**MODEL, **SIZES})
    layout, params, routing = text_model(case)
    paths = set(params_lib.flatten(params))
    optimizer = make_optimizer(OptimizerConfig(), paths, dict.fromkeys(paths, ORDINARY))
    step = jax.jit(make_train_step(layout.model, optimizer, trainable=paths), donate_argnums=0)
    tokens = case.tokens[:, : case.length + 1]
    batch = put_batch(text_batch(layout.model.config, tokens[:, :-1], tokens[:, 1:]), layout)
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), routing)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    del params
    timed: dict[str, list[Times]] = {"step": [], "held up": [], "checksums alone": [], "to disk": []}

    def advance() -> None:
        nonlocal state
        with sharding.use_mesh(layout.mesh, layout.rules):
            state, _ = step(state, batch, 1e-4)
        jax.block_until_ready(state)

    advance()  # compiles
    with tempfile.TemporaryDirectory() as folder:
        checkpointer = Checkpointer(Path(folder), keep=1)
        for number in range(repeats + 1):
            taken = {"step": _timed(advance)}
            trees: Any = {"params": state.params, "training": {"optimizer": state.optimizer}}
            save = functools.partial(checkpointer.save, number, **trees, record={})
            taken["checksums alone"] = _timed(functools.partial(described, trees))
            taken["held up"] = _timed(save)
            taken["to disk"] = _timed(checkpointer.wait)
            del trees, save
            for name, times in taken.items() if number else ():
                timed[name].append(times)
        checkpointer.close()
    result: dict[str, Any] = {"benchmark": "checkpoint", "unit": "seconds", "repeats": repeats}
    result |= {"case": dataclasses.asdict(case), "parameters": parameters, "machine": machine()}
    result["measured"] = {
        name: {clock: spread([times[i] for times in turns]) for i, clock in enumerate(CLOCKS)}
        for name, turns in timed.items()
    }
    medians = {name: {c: clocks[c]["median"] for c in CLOCKS} for name, clocks in result["measured"].items()}
    result["share_of_a_step"] = {c: medians["held up"][c] / medians["step"][c] for c in CLOCKS}
    print(_table(result))
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _timed(action: Callable[[], Any]) -> Times:
    cpu, wall = time.process_time(), time.perf_counter()
    action()
    return time.process_time() - cpu, time.perf_counter() - wall


def _table(result: dict[str, Any]) -> str:
    lines = [
        f"seconds, median (lowest - highest) of {result['repeats']}; {result['parameters']:,} parameters"
    ]
    lines.append(f"{'':18}{'CPU time':28}wall time")
    for name, clocks in result["measured"].items():
        cells = ["{median:.2f} ({lowest:.2f} - {highest:.2f})".format(**clocks[clock]) for clock in CLOCKS]
        lines.append(f"{name:18}{cells[0]:28}{cells[1]}")
    shares = result["share_of_a_step"]
    lines.append(
        f"a save holds up {shares['cpu']:.1%} of a step by CPU time, {shares['wall']:.1%} by the wall"
    )
    return "\n".join(lines)
