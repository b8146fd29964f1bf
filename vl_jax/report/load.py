"""How tokens are spread over experts, as the log of a run tells it: by stack, layer and modality.

The main stack of a model is logged as ``routing/<figure>``, others as ``routing/<stack>/<figure>``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vl_jax.batch import MODALITIES
from vl_jax.report.charts import Series, absent, heatmap, number, percent, ramp

LOAD, CHURN = "load", "churn"
# Title, figure, how a value is shown, and what to know of it.
ROUTING_CHARTS = (
    (
        "Busiest expert above the even share (MaxVio)",
        "maxvio",
        number,
        "0 is perfect balance; 1 is twice the share.",
    ),
    (
        "The same of the running load",
        "maxvio_running",
        number,
        "Averaged over about a hundred steps: what remains is no chance of a batch.",
    ),
    ("Experts without a token (dead)", "dead", number, ""),
    ("Tokens dropped", "drop_rate", percent, ""),
    ("Choices that changed (churn)", CHURN, percent, "Of a fixed batch, in one step."),
    ("Entropy of the router, nats", "entropy", number, "Of a token's probabilities; low: it is sure."),
    ("Margin of the choice", "margin", number, "Lowest probability chosen, less the highest of the others."),
    ("Gate mass", "gate_mass", number, "What the gates of a token sum to, without what was dropped."),
    ("Experts of a token", "experts", number, ""),
    ("Experts of a token, deviation", "experts_deviation", number, "0 where all tokens have as many."),
)
EXPECTED = ("maxvio", "maxvio_running", "dead", "drop_rate")  # of which a log without them says so
_OWN = {"loss_": "Loss of the router: {}", "state_": "State of the scheme: {}"}
# Lines of the log over which the final expert load is averaged: one step says little about rare experts.
_LOAD_LINES = 10


def logged_stacks(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """The stacks whose load the log tells of; "" is the main one."""
    names = dict.fromkeys(name for line in lines for name in line if name.startswith("routing/"))
    found = [name.split("/")[1:-1] for name in names if name.endswith(f"/{LOAD}")]
    return ["/".join(parts) for parts in found]


def figures_of(lines: Sequence[Mapping[str, Any]], stack: str) -> list[dict[str, Any]]:
    """The lines that hold figures of a stack, each with its step and those figures by their own names."""
    prefix = f"routing/{stack}/" if stack else "routing/"
    found = []
    for line in lines:
        names = [name for name in line if name.startswith(prefix) and "/" not in name[len(prefix) :]]
        if names:
            found.append({"step": line["step"], **{name[len(prefix) :]: line[name] for name in names}})
    return found


def load_cards(lines: Sequence[Mapping[str, Any]]) -> str:
    """One heat map for every modality: rows are layers, a cell is load divided by an even share."""
    loads, cards = [line[LOAD] for line in lines if line.get(LOAD)][-_LOAD_LINES:], ""
    for modality, name in enumerate(MODALITIES):
        rows = [
            _relative([load[layer][modality] for load in loads])
            for layer in range(min(map(len, loads), default=0))
        ]
        if not any(value is not None for row in rows for value in row):
            chart = absent(f"No {name} token was routed.")
        else:
            chart = scale("even share", "no token")
            chart += heatmap(rows, title=f"Expert load of {name} tokens by layer")
        cards += f'<div class="card"><h3>Expert load of {name} tokens</h3>{chart}</div>'
    return cards


def scale(unit: str, none: str) -> str:
    """The legend of a heat map: multiples of a unit, and what a dot means."""
    colours = f'<span>¼ <i class="load"></i> 4 × {unit}</span>'
    return f'<div class="legend">{colours}<span>● {none}</span></div>'


def _relative(loads: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Load of each expert summed over lines, as a multiple of the mean over experts."""
    sums = [sum(v or 0.0 for v in column) for column in zip(*loads, strict=True)]
    total = sum(sums)
    return [value * len(sums) / total if total > 0 else None for value in sums]


def layer_series(lines: Sequence[Mapping[str, Any]], name: str) -> list[Series]:
    """A figure over training, one line a layer."""
    lines = [line for line in lines if line.get(name)]
    count = max((len(line[name]) for line in lines), default=0)
    return [
        Series(
            f"layer {layer}",
            [(line["step"], line[name][layer]) for line in lines if layer < len(line[name])],
            ramp(layer, count),
        )
        for layer in range(count)
    ]


def own_charts(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Title and name of what a scheme brings: each of its losses, and state of one number a layer."""
    names = dict.fromkeys(name for line in lines for name in line)
    found = []
    for begins, title in _OWN.items():
        for name in (name for name in names if name.startswith(begins)):
            values = next(line[name] for line in lines if name in line)
            if not any(isinstance(value, list) for value in values):
                found.append((title.format(name[len(begins) :]), name))
    return found
