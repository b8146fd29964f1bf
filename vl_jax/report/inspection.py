"""``inspect``: what an experiment would run, shown without training anything."""

from __future__ import annotations

import functools
import logging
import math
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.progress import track
from rich.table import Table

from vl_jax import params as params_lib
from vl_jax import schema, sharding
from vl_jax.data.config import PackingConfig
from vl_jax.data.stream.padding import WasteReport
from vl_jax.data.text.chat import Targets
from vl_jax.data.tools import examination, preview
from vl_jax.data.tools.examination import Examination
from vl_jax.experiment import Experiment, example_batch, mixture, model_spec, plan
from vl_jax.layout import Layout, plan_layout
from vl_jax.report import data as data_page
from vl_jax.report import shardings
from vl_jax.report.shardings import ParameterRow
from vl_jax.sharding import MeshConfig
from vl_jax.train.stages import adapter_shapes, trainable_paths

logger = logging.getLogger(__name__)


def show(
    experiment: Experiment,
    what: str,
    *,
    samples: int,
    examine: int,
    html: Path | None,
    mesh: MeshConfig | None = None,
) -> None:
    """Prints the resolved config, the parameter table, or what the data is like.

    Args:
      html: file for what is said of data or parameters as a page.
      mesh: of devices that need not be here, on which parameters are shown; None: the experiment's.
    """
    console = Console()
    if what == "config":
        console.print_json(schema.to_json(experiment))
    elif what == "params":
        rows, totals = parameter_rows(experiment, mesh)
        table = parameter_table(rows, totals)
        if _natural_width(table, console) <= console.width:
            console.print(table)
        else:
            console.print(parameter_list(rows, totals, width=console.width), markup=False, highlight=False)
        if html is not None:
            html.write_text(shardings.render(experiment.name, rows, totals), encoding="utf-8")
            console.print(f"page: {html}")
    else:
        show_data(experiment, console, samples=samples, examine=examine, html=html)


def parameter_rows(
    experiment: Experiment, mesh: MeshConfig | None = None
) -> tuple[list[ParameterRow], tuple[str, str, str]]:
    """A row for every parameter; and of all of them the number, the mesh, and the bytes on one device.

    Args:
      mesh: of devices that need not be here; None: the experiment's, of those that are.
    """
    layout = plan(experiment) if mesh is None else _on_absent(experiment, mesh)
    trains = {stage.name: trainable_paths(stage, layout.params) for stage in experiment.stages}
    for stage in experiment.stages:
        adapters = params_lib.flatten(adapter_shapes(stage, layout.params, layout.roles))
        if adapters:
            trains[f"{stage.name} (adapter)"] = {path.rpartition("/")[0] for path in adapters}
    rows, total = [], 0
    for path, leaf in params_lib.flatten(layout.params).items():
        placement = layout.placements[path]
        total += leaf.size
        stages = [name for name, paths in trains.items() if path in paths]
        rows.append(
            ParameterRow(
                path,
                leaf.shape,
                axes=tuple(name or "" for name in placement.names),
                spec=tuple(str(axis) if axis else "" for axis in placement.spec),
                whole=tuple(placement.whole),
                parts=tuple(
                    n // max(part, 1)
                    for n, part in zip(leaf.shape, leaf.sharding.shard_shape(leaf.shape), strict=True)
                ),
                size=_bytes_on_device(leaf),
                trained=", ".join(stages) or "never",
            )
        )
    on_device = f"{sum(row.size for row in rows):,}"
    shown = " x ".join(f"{axis}={size}" for axis, size in layout.mesh.shape.items())
    return rows, (f"{total:,} parameters", shown, on_device)


def _on_absent(experiment: Experiment, config: MeshConfig) -> Layout:
    """Where parameters would live; of batches that would not divide it only warns."""
    mesh = sharding.absent_mesh(config)
    rows = sharding.batch_axes(mesh)
    for stage in experiment.stages:
        if stage.batch_size // stage.accumulation % rows:
            part = f"{stage.batch_size // stage.accumulation} rows do not divide by {rows} batch shards"
            logger.warning("stages.%s.batch_size=%d: %s", stage.name, stage.batch_size, part)
    return plan_layout(experiment.model, example_batch(experiment, rows), mesh)


def parameter_table(rows: Sequence[ParameterRow], totals: tuple[str, str, str]) -> Table:
    """One line per parameter: shape, logical axes, mesh axes, bytes on one device, stages that train it."""
    table = Table("parameter", "shape", "logical axes", "mesh axes", "parts", "bytes/device", "trained in")
    for row in rows:
        axes = ", ".join(axis or "-" for axis in row.spec)
        whole = f" [red]not divided: {', '.join(row.whole)}[/red]" if row.whole else ""
        names, shape = ", ".join(name or "-" for name in row.axes), " x ".join(map(str, row.shape))
        parts = " x ".join(map(str, row.parts))
        table.add_row(row.path, shape, names, axes + whole, parts, f"{row.size:,}", row.trained)
    number, mesh, on_device = totals
    table.add_section()
    table.add_row("total", number, "", mesh, "", on_device, "")
    return table


def parameter_list(rows: Sequence[ParameterRow], totals: tuple[str, str, str], *, width: int) -> str:
    """The table for a narrow screen, a file or a pipe: the path first, and below it what is said of it."""
    number, mesh, on_device = totals
    lines = [
        "PARAMETER, bytes per device",
        "    size (logical axis > mesh axis) of each dimension; trained in",
    ]
    for row in rows:
        lines.append(_two_sides(row.path, f"{row.size:,}", width))
        spec = (*row.spec, *[""] * len(row.shape))
        sizes = ", ".join(map(_dimension, row.shape, row.axes, spec)) or "scalar"
        said = [f"{sizes}; {row.trained}", *(f"not divided: {name}" for name in row.whole)]
        if math.prod(row.parts) > 1:
            said.append(f"in {' x '.join(map(str, row.parts))} parts")
        for text in said:
            lines += textwrap.wrap(text, width, initial_indent=" " * 4, subsequent_indent=" " * 6)
    return "\n".join([*lines, _two_sides(f"total: {number}", on_device, width), f"    mesh: {mesh}"])


def _dimension(size: int, axis: str, mesh: str) -> str:
    names = " > ".join(name for name in (axis, mesh) if name)
    return f"{size} ({names})" if names else str(size)


def _natural_width(table: Table, console: Console) -> int:
    """How wide a table is when nothing in it is wrapped."""
    return Measurement.get(console, console.options.update(width=10_000), table).maximum


def _two_sides(left: str, right: str, width: int) -> str:
    """Two texts at the ends of a line."""
    return f"{left}{right:>{max(width - len(left), len(right) + 1)}}"


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
