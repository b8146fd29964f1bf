"""What a gate saves that leaves looks out: time and rows, at several budgets, beside the gate that is open.

The governed part alone is timed: norms, projections, attention and output of the cross-modal gate in one
layer. Who is open is laid down, so that a budget is met exactly: every fourth row for a quarter, and so on.
In a turn every budget runs once, in an order that changes, between two runs of the gate that computes all;
a ratio is of times in one turn, which other work on the machine disturbs alike.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vl_jax.benchmarks.step import machine, spread
from vl_jax.fusion.budget import BudgetConfig, Grain
from vl_jax.fusion.gate import CrossModalGateConfig, SkippingGate

BUDGETS = (0.0, 0.25, 0.5, 0.75, 1.0)
GRAINS: tuple[Grain, ...] = ("layer", "token")  # ``sample`` skips as ``layer`` does


@dataclasses.dataclass(frozen=True)
class Looks:
    """The sizes of what is measured."""

    rows: int = 16
    tokens: int = 256
    visual: int = 196  # of one picture, by the 14 x 14 tokens of a tile
    width: int = 256
    num_heads: int = 8
    head_dim: int = 32
    buckets: int = 4


def run(*, repeats: int = 9, json_file: Path | None = None, case: Looks | None = None) -> dict[str, Any]:
    """Measures, prints a table and returns the figures.

    Args:
      repeats: turns; medians are reported, with the lowest and the highest.
      json_file: where the figures go too.

    Raises:
      ValueError: there are no repeats.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: must be at least 1")
    case = case or Looks()
    measured = {grain: _measure(grain, case, repeats) for grain in GRAINS}
    result = {"benchmark": "gate", "repeats": repeats, "case": dataclasses.asdict(case)}
    result |= {"machine": machine(), "measured": measured}
    print(table(result))
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _measure(grain: Grain, case: Looks, repeats: int) -> dict[str, Any]:
    """Of every budget the rows computed, and times as ratios to the gate that computes all."""
    every = _program(grain, case, buckets=0)
    skipping = _program(grain, case, buckets=case.buckets)
    inputs = {budget: _inputs(grain, case, budget) for budget in BUDGETS}
    all_open = inputs[1.0]
    counted = {budget: float(skipping(*given)[1].executed) for budget, given in inputs.items()}
    most = float(every(*all_open)[1].executed)  # which compiles, too
    ratios: dict[float, list[tuple[float, float]]] = {budget: [] for budget in BUDGETS}
    for turn in range(repeats):
        before = _timed(every, all_open)
        order = BUDGETS[turn % len(BUDGETS) :] + BUDGETS[: turn % len(BUDGETS)]
        found = {budget: _timed(skipping, inputs[budget]) for budget in order}
        whole = np.mean([before, _timed(every, all_open)], axis=0)
        for budget, seconds in found.items():
            ratios[budget].append(tuple(np.divide(seconds, whole).tolist()))
    return {
        f"{budget:.0%}": {
            "rows": counted[budget],
            "rows_share": counted[budget] / most,
            **{clock: spread([r[i] for r in ratios[budget]]) for i, clock in enumerate(("cpu", "wall"))},
        }
        for budget in BUDGETS
    }


def _program(grain: Grain, case: Looks, *, buckets: int) -> Callable[..., Any]:
    budget = BudgetConfig(grain, buckets=buckets)
    gate = SkippingGate(CrossModalGateConfig(case.num_heads, case.head_dim, opens=False, budget=budget))
    return jax.jit(gate.apply)


def _inputs(grain: Grain, case: Looks, share: float) -> tuple[Any, ...]:
    """Parameters and inputs of a gate of which that share is open, spread evenly."""
    random = np.random.default_rng(0)
    x, vision = (
        random.standard_normal((case.rows, n, case.width)).astype(np.float32)
        for n in (case.tokens, case.visual)
    )
    rows = _spread(case.rows, share)
    if grain == "token":  # the first feature of a token says whether it is open
        x[..., 0] = np.where(_spread(case.tokens, share), 3.0, -3.0)
    mask = jnp.ones((case.rows, case.tokens, case.visual), bool)
    given = jnp.asarray(x), jnp.asarray(vision), mask, jnp.where(jnp.asarray(rows), 1.0, -1.0)
    gate = SkippingGate(
        CrossModalGateConfig(case.num_heads, case.head_dim, opens=False, budget=BudgetConfig(grain))
    )
    params: Any = nn.meta.unbox(gate.init(jax.random.key(0), *given)["params"])
    if grain == "token":
        kernel = jnp.zeros((case.width, 1)).at[0].set(1.0)
        params = {**params, "choice": {"kernel": kernel, "bias": jnp.zeros(1)}}
    return {"params": params}, *given


def _spread(count: int, share: float) -> np.ndarray:
    """``bool[count]``, of which that share is true, evenly spread."""
    steps = np.floor(np.arange(count + 1) * share + 1e-9)
    return np.diff(steps) > 0


def _timed(function: Callable[..., Any], given: tuple[Any, ...]) -> tuple[float, float]:
    """(CPU seconds, wall seconds) of one run."""
    cpu, wall = time.process_time(), time.perf_counter()
    jax.block_until_ready(function(*given))
    return time.process_time() - cpu, time.perf_counter() - wall


def table(result: dict[str, Any]) -> str:
    """The figures as text: medians, and in brackets the lowest and the highest."""

    turns = result["repeats"]

    def cell(found: dict[str, float]) -> str:
        return "{median:.2f} ({lowest:.2f} - {highest:.2f})".format(**found)

    lines = [f"the gate alone, as ratios to one that computes all: median (lowest - highest), {turns} turns"]
    lines.append(f"{'decided by':12}{'budget':>8}{'rows':>8}{'of all':>8}  {'CPU time':24}wall time")
    for grain, budgets in result["measured"].items():
        for name, found in budgets.items():
            rows = f"{found['rows']:8.0f}{found['rows_share']:8.0%}"
            lines.append(f"{grain:12}{name:>8}{rows}  {cell(found['cpu']):24}{cell(found['wall'])}")
    return "\n".join(lines)
