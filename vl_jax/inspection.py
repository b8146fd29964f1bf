"""``inspect``: what an experiment would run, shown without training anything."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from vl_jax import config as config_lib
from vl_jax import params as params_lib
from vl_jax.data import packed, preview, waste
from vl_jax.experiment import Experiment, mixture, model_spec, plan
from vl_jax.train.stages import adapter_shapes, trainable_paths


def show(experiment: Experiment, what: str, *, samples: int, html: Path | None) -> None:
    """Prints the resolved config, the parameter table, or rendered samples."""
    console = Console()
    if what == "config":
        console.print_json(config_lib.to_json(experiment))
    elif what == "params":
        console.print(parameter_table(experiment))
    else:
        show_data(experiment, console, samples=samples, html=html)


def parameter_table(experiment: Experiment) -> Table:
    """One row per parameter: shape, logical axes, mesh axes, bytes on one device, stages that train it."""
    layout = plan(experiment)
    trains = {stage.name: trainable_paths(stage, layout.params) for stage in experiment.stages}
    for stage in experiment.stages:
        adapters = params_lib.flatten(adapter_shapes(stage, layout.params))
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


def show_data(experiment: Experiment, console: Console, *, samples: int, html: Path | None) -> None:
    """Renders samples of every source (text with the predicted tokens marked, tiles), and counts padding."""
    pages = []
    for source in (*experiment.data.sources, *experiment.data.evaluation):
        previews = preview.render_samples(
            experiment.data,
            model_spec(experiment),
            source.name,
            count=samples,
            targets=experiment.stages[-1].targets,
        )
        console.rule(source.name)
        console.print(preview.to_text(previews), markup=False, highlight=False)
        pages += previews
    if experiment.data.packing is not None:
        for stage in experiment.stages:
            console.rule(f"packed rows of stage {stage.name}")
            planner, _ = packed.open_planner(
                experiment.data,
                model_spec(experiment),
                sources=mixture(experiment, stage),
                targets=stage.targets,
            )
            report = str(waste.predict(planner, experiment.data))
            console.print(report, markup=False, highlight=False)
    if html is not None:
        html.write_text(preview.to_html(pages), encoding="utf-8")
        console.print(f"page: {html}")
