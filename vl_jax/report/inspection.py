"""``inspect``: what an experiment would run, shown without training anything."""

from __future__ import annotations

import functools
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from vl_jax import params as params_lib
from vl_jax import schema
from vl_jax.data.config import PackingConfig
from vl_jax.data.stream.padding import WasteReport
from vl_jax.data.text.chat import Targets
from vl_jax.data.tools import examination, preview
from vl_jax.data.tools.examination import Examination
from vl_jax.experiment import Experiment, mixture, model_spec, plan
from vl_jax.report import data as data_page
from vl_jax.train.stages import adapter_shapes, trainable_paths


def show(experiment: Experiment, what: str, *, samples: int, examine: int, html: Path | None) -> None:
    """Prints the resolved config, the parameter table, or what the data is like."""
    console = Console()
    if what == "config":
        console.print_json(schema.to_json(experiment))
    elif what == "params":
        console.print(parameter_table(experiment))
    else:
        show_data(experiment, console, samples=samples, examine=examine, html=html)


def parameter_table(experiment: Experiment) -> Table:
    """One row per parameter: shape, logical axes, mesh axes, bytes on one device, stages that train it."""
    layout = plan(experiment)
    trains = {stage.name: trainable_paths(stage, layout.params) for stage in experiment.stages}
    for stage in experiment.stages:
        adapters = params_lib.flatten(adapter_shapes(stage, layout.params, layout.roles))
        trains[f"{stage.name} (adapter)"] = {path.rpartition("/")[0] for path in adapters}
    table = Table("parameter", "shape", "logical axes", "mesh axes", "bytes/device", "trained in")
    total = on_device = 0
    for path, leaf in params_lib.flatten(layout.params).items():
        placement = layout.placements[path]
        size = _bytes_on_device(leaf)
        total, on_device = total + leaf.size, on_device + size
        stages = [name for name, paths in trains.items() if path in paths]
        axes = ", ".join(str(a) if a else "-" for a in placement.spec)
        whole = f" [red]not divided: {', '.join(placement.whole)}[/red]" if placement.whole else ""
        names = ", ".join(n or "-" for n in placement.names)
        shape = " x ".join(map(str, leaf.shape))
        table.add_row(path, shape, names, axes + whole, f"{size:,}", ", ".join(stages) or "never")
    table.add_section()
    table.add_row("total", f"{total:,} parameters", "", experiment.mesh.describe(), f"{on_device:,}", "")
    return table


def _bytes_on_device(leaf) -> int:
    shard = leaf.sharding.shard_shape(leaf.shape)
    size = leaf.dtype.itemsize
    for n in shard:
        size *= n
    return size


def show_data(
    experiment: Experiment, console: Console, *, samples: int, examine: int, html: Path | None
) -> None:
    """Examines every source, predicts padding, and shows samples as the model will read them."""
    data, spec, targets = experiment.data, model_spec(experiment), experiment.stages[-1].targets
    examinations, previews = [], {}
    for source in (*data.sources, *data.evaluation):
        watch: Any = functools.partial(track, description=source.name, console=console, transient=True)
        found = examination.examine(data, spec, source.name, targets=targets, limit=examine, progress=watch)
        examinations.append(found)
        previews[source.name] = preview.render_samples(
            data, spec, source.name, count=samples, targets=targets
        )
        console.rule(source.name)
        console.print(preview.to_text(previews[source.name]), markup=False, highlight=False)
        console.print(_summary(found), markup=False, highlight=False)

    @functools.cache  # Stages often draw from the same sources.
    def predict(
        weights: tuple[tuple[str, float], ...], targets: Targets
    ) -> tuple[PackingConfig, WasteReport]:
        return examination.padding(data, spec, sources=dict(weights), targets=targets, window=examine)

    padding = {}
    for stage in experiment.stages if spec.packs else ():
        padding[stage.name] = predict(tuple(mixture(experiment, stage).items()), stage.targets)
        row, report = padding[stage.name]
        console.rule(f"padding of stage {stage.name}")
        known = "" if data.packing else ", which data.packing could make"
        rows = f"rows of {row.max_tokens:,} tokens and {row.max_tiles:,} tiles{known}"
        console.print(rows, highlight=False)
        console.print(str(report), markup=False, highlight=False)
    if html is not None:
        page = data_page.render(
            experiment.name,
            examinations,
            padding,
            previews,
            max_tokens=data.max_tokens,
            max_tiles=data.max_tiles,
        )
        html.write_text(page, encoding="utf-8")
        console.print(f"page: {html}")


def _summary(found: Examination) -> str:
    """A source in a few lines."""
    lines = [f"{found.num_usable:,} of {found.num_examined:,} records examined can be used"]
    lines[0] += f" ({found.num_records:,} in all)"
    if found.tokens:
        middle = statistics.median(found.tokens)
        lines.append(
            f"a sample has {middle:,.0f} tokens (median), at most {max(found.tokens):,}; "
            f"at most {max(found.tiles):,} tiles"
        )
    lines += [f"{f.count:,} x {f.what}, for example {f.examples[0]}" for f in found.findings]
    if found.blind is not None:
        lines.append(
            f"{found.blind:.0%} of {found.num_repeated:,} answers to questions asked often are the usual one"
        )
    lines += [f"always {g.answer!r} ({g.share:.0%} of {g.asked}): {g.question}" for g in found.guesses]
    return "\n".join(lines)
