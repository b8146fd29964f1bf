"""What a run comes to, as one row of a table: its scores, and the figures of its log."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from vl_jax.report.load import figures_of, logged_stacks
from vl_jax.report.results import is_share, others, read_json
from vl_jax.report.run import RunFiles

FAILED_FILE = "failed.json"  # in the folder of a run of a sweep: why it failed
LAST_LINES = 10  # the log's end, over which noisy values are averaged
# Figures of routing that a row has, each the mean of layers; of stacks beside the main one under their names.
_ROUTING = ("maxvio", "maxvio_running", "dead", "drop_rate")
_NOISY = ("loss", "auxiliary_loss", "grad_norm", "tokens_per_second", "step_ms", "data_wait_ms")
_FAMILIES = ("gate/", "gradients/")  # of such values, whatever their names
_FACTS = ("wall_time_s", "parameters", "peak_memory_mb", "commit")
# Parts of names of figures that are better when they are lower; nothing is known of others but shares.
_LOWER = (
    *("loss", "perplexity", "bits", "error", "rank", "maxvio", "dead", "drop_rate", "churn", "false_alarms"),
    *("step_ms", "data_wait_ms", "wall_time_s", "memory", "flops", "parameters", "malformed"),
)


def row(run: RunFiles) -> dict[str, Any]:
    """What a table says of one run; an unfinished run has fewer entries."""
    result: dict[str, Any] = {"run": run.folder.name}
    failed = read_json(run.folder / FAILED_FILE)
    if failed is not None:
        result["failed"] = str(failed.get("reason", ""))
    for task, history in run.history.items():
        last = history[-1]
        first, scores = last["headline"], last["scores"]
        names = [name for name in (first, *others(last, scores)) if name in scores]
        result |= {f"{task}: {name}": scores[name] for name in names}
        for kind, groups in last["groups"].items():
            result |= {f"{task}: {kind}={group}": found.get(first) for group, found in groups.items()}
    result["steps"] = run.lines[-1]["step"] if run.lines else 0
    result |= {name: value for name, value in _held_out(run.lines).items() if name not in result}
    logged = dict.fromkeys(name for line in run.lines for name in line if name.startswith(_FAMILIES))
    for name in (*_NOISY, *logged):
        values = [value for _, value in points(run, name)][-LAST_LINES:]
        if values:
            result[name] = statistics.fmean(values)
    for stack in logged_stacks(run.lines):
        prefix = f"routing/{stack}/" if stack else "routing/"
        lines = figures_of(run.lines, stack)
        result |= {f"{prefix}{name}": value for name, value in _routing(lines).items()}
    for name in ("routing/maxvio_mean",):  # a log without load, of an earlier version
        values = [value for _, value in points(run, name)][-LAST_LINES:]
        if values:
            result.setdefault(name, statistics.fmean(values))
    result |= {name: run.facts[name] for name in _FACTS if run.facts and name in run.facts}
    return result


def points(run: RunFiles, name: str) -> list[tuple[float, float]]:
    """A value of the log by step; ``routing/<x>_mean`` is the mean of ``routing/<x>`` over layers."""
    found = []
    for line in run.lines:
        value = line.get(name, line.get(name.removesuffix("_mean")))
        if isinstance(value, list):
            value = _mean(value)
        if value is not None:
            found.append((line["step"], value))
    return found


def shares(runs: Sequence[RunFiles]) -> set[str]:
    """The entries of ``row`` that are shares of one."""
    names: set[str] = set()
    for task, last in ((task, history[-1]) for run in runs for task, history in run.history.items()):
        names |= {f"{task}: {name}" for name in last["shares"]}
        if is_share(last, last["headline"]):
            names |= {f"{task}: {kind}={group}" for kind, found in last["groups"].items() for group in found}
    return names


def better(name: str, shares: set[str]) -> str | None:
    """Which way a figure is better, ``lower`` or ``higher``; None where nothing is known."""
    if any(part in name.rpartition(": ")[2].lower() for part in _LOWER):
        return "lower"
    return "higher" if name in shares or name == "tokens_per_second" else None


def _held_out(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The last of every figure that was measured on held-out samples while training."""
    found: dict[str, float] = {}
    for line in lines:
        found |= {k: v for k, v in line.items() if k.startswith("eval/") and v is not None}
    return found


def _routing(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Figures of a stack at the end of a log, means of layers and of the last lines that have them."""
    result = {}
    for name in _ROUTING:
        means = [m for m in (_mean(line[name]) for line in lines if line.get(name)) if m is not None]
        if means:
            result[f"{name}_mean"] = statistics.fmean(means[-LAST_LINES:])
    loads = [line["load"] for line in lines if line.get("load")][-LAST_LINES:]
    layers = [
        information([[[e or 0.0 for e in row] for row in load[layer]] for load in loads])
        for layer in range(min(map(len, loads), default=0))
    ]
    if layers:
        result["entropy_mean"] = statistics.fmean(entropy for entropy, _ in layers)
        result["mutual_information_mean"] = statistics.fmean(shared for _, shared in layers)
    return result


def information(loads: Sequence[Sequence[Sequence[float]]]) -> tuple[float, float]:
    """Entropy of the experts, and their mutual information with the modality, in nats.

    Every modality that has tokens weighs alike: the log has shares of load within each, not how many tokens
    they were.

    Args:
      loads: shares by line of the log, modality and expert.
    """
    summed = [[sum(e) for e in zip(*rows, strict=True)] for rows in zip(*loads, strict=True)]
    given = [[e / sum(modality) for e in modality] for modality in summed if sum(modality) > 0]
    if not given:
        return 0.0, 0.0
    together = [statistics.fmean(e) for e in zip(*given, strict=True)]
    return _entropy(together), max(0.0, _entropy(together) - statistics.fmean(map(_entropy, given)))


def _entropy(shares: Sequence[float]) -> float:
    return -sum(p * math.log(p) for p in shares if p > 0)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else None
