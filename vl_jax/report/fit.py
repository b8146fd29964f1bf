"""A rehearsal for people: on the terminal, as JSON, and as a page of one file."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vl_jax.experiment import Experiment
from vl_jax.fit.chips import GIB, slice_of
from vl_jax.fit.experiment import rehearse, search, smallest
from vl_jax.fit.rehearsal import Rehearsal
from vl_jax.fit.search import Setting
from vl_jax.moe.bounded import rooms
from vl_jax.report.run import page
from vl_jax.report.tables import Cell, TextTable, to_html
from vl_jax.runtime import disk

ASSUMPTIONS = (
    "The time is a bound, not a measurement: the longest of products at peak, memory traffic at peak and "
    "collectives at the peak of the links, as if none waited for another. Model flops are three times the "
    "forward pass; what the backward pass computes again counts as time lost."
)


def show(
    experiment: Experiment,
    *,
    topology: str | None,
    slices: int,
    stage: str | None,
    compiles: bool,
    thorough: bool,
    search: bool,
    json_file: Path | None,
    html: Path | None,
) -> None:
    """Rehearses and prints what was found; writes the same to files.

    Args:
      topology: None: the smallest slice of every generation.
      thorough: compile with the effort of a run.
      search: try settings, and rank them.
    """
    console = Console()
    if topology is None:
        tables, result = _smallest(experiment, stage, console)
    elif search:
        tables, result = _search(experiment, topology, slices, stage)
    else:
        found = rehearse(
            experiment, slice_of(topology, slices), stage=stage, compiles=compiles, thorough=thorough
        )
        tables, result = tables_of(found), as_json(found)
    for title, table in tables:
        console.print(_on_terminal(title, table))
    console.print(ASSUMPTIONS, style="dim")
    if json_file is not None:
        disk.write_text(json_file, json.dumps(result, indent=2) + "\n")
    if html is not None:
        sections = [(title, to_html(table)) for title, table in tables]
        name = f"{experiment.name} on {topology or 'every generation'}"
        disk.write_text(html, page(name, ASSUMPTIONS, sections, kind="fit"))


def as_json(found: Rehearsal) -> dict[str, Any]:
    """The figures of a rehearsal, with the sums that the tables show."""
    result = dataclasses.asdict(found)
    result["memory"] |= {"state": found.memory.state, "total": found.memory.total}
    return {**result, "fits": found.fits}


def tables_of(found: Rehearsal) -> list[tuple[str, TextTable]]:
    """Memory, findings, collectives and the estimate, under their titles."""
    mesh = " x ".join(f"{axis}={size}" for axis, size in found.mesh.items())
    where = f"{found.topology}{f' x {found.slices} slices' if found.slices > 1 else ''}"
    title = f"{found.stage}: {found.rows} rows on {where}, {found.devices} devices, {mesh}"
    tables = [(f"{title}: {'fits' if found.fits else 'DOES NOT FIT'}", _memory(found))]
    if found.findings:
        tables.append(("To look at", _findings(found)))
    if found.collectives is not None:
        tables.append(("What travels between devices, a step", _collectives(found)))
    if found.exchanges:
        tables.append(("Rooms of the exchange of tokens, on a device and for a round", _rooms(found)))
    return [*tables, ("Estimate", _estimate(found))]


def _memory(found: Rehearsal) -> TextTable:
    memory = found.memory
    counted = "the compiler's" if found.thorough else "the compiler's, with less effort than for a run"
    lines = (
        ("parameters", memory.parameters, "exact"),
        ("optimiser", memory.optimizer, "exact"),
        ("adapters, collections, routing", memory.others, "exact"),
        ("batch", memory.batch, "exact"),
        ("activations and temporaries", memory.temporaries, counted),
        ("all at once", memory.total, ""),
        ("a device has", memory.limit, "as the compiler may use it"),
    )
    rows = [
        [Cell(name), Cell(_gib(size)), Cell(share(size, memory.limit)), Cell(how)]
        for name, size, how in lines
    ]
    rows[-2][1] = dataclasses.replace(rows[-2][1], mood="good" if found.fits else "bad")
    return TextTable(("on one device", "GiB", "of it", ""), rows)


def share(size: int | None, limit: int) -> str:
    """A size as a share of what there is."""
    return "–" if size is None else f"{100 * size / limit:.1f} %"


def _gib(size: int | None) -> str:
    return "–" if size is None else f"{size / GIB:.3f}"


def _findings(found: Rehearsal) -> TextTable:
    rows = [
        [
            Cell(f.what, mood="bad" if f.is_fault else ""),
            Cell(f.about),
            Cell(f.remedy),
            Cell(f"{f.size / 2**20:,.1f}" if f.size else ""),
        ]
        for f in found.findings
    ]
    return TextTable(("what", "of", "what to do", "MiB"), rows, left=3)


def _collectives(found: Rehearsal) -> TextTable:
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    sizes: collections.Counter[tuple[str, str]] = collections.Counter()
    for item in found.collectives or ():
        key = (item.kind, ", ".join(item.axes) or "not to be told")
        counts[key] += item.times
        sizes[key] += item.size * item.times
    rows = [
        [Cell(kind), Cell(axes), Cell(f"{counts[kind, axes]:,}"), Cell(f"{size / 2**20:,.1f}")]
        for (kind, axes), size in sizes.most_common()
    ]
    return TextTable(("collective", "along", "a step", "MiB a device"), rows, left=2)


def _rooms(found: Rehearsal) -> TextTable:
    """The planned rows of every hop; what finds no room follows in another round."""
    rows = []
    for traffic in found.exchanges:
        layer = f"{traffic.num_experts} experts, {traffic.top_k} a token, {traffic.tokens:,} tokens"
        hops = rooms.plan(traffic)
        for number, hop in enumerate(hops):
            among = f"{hop.shards} {'slices' if len(hops) > 1 and not number else 'devices'}"
            counts = (traffic.num_chunks, hop.tokens, hop.sent, hop.received, hop.pairs)
            rows.append([Cell(layer), Cell(among), *(Cell(f"{n:,}") for n in counts)])
    head = ("layer", "among", "chunks", "tokens of one", "rows out", "rows in", "rows of experts")
    return TextTable(head, rows, left=2)


def _estimate(found: Rehearsal) -> TextTable:
    e = found.estimate
    lines = (
        ("model flops of a device", f"{e.flops:.3g}"),
        ("products at peak", _ms(e.compute_seconds)),
        ("memory traffic at peak", _ms(e.memory_seconds)),
        ("collectives at peak", _ms(e.link_seconds)),
        ("a step at least", _ms(e.seconds)),
        ("MFU at most", "–" if e.mfu is None else f"{100 * e.mfu:.1f} %"),
        ("compiling took", "–" if found.compile_seconds is None else f"{found.compile_seconds:.0f} s of CPU"),
    )
    return TextTable(("figure", "value"), [[Cell(name), Cell(value)] for name, value in lines])


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1000 * seconds:.2f} ms"


def _smallest(
    experiment: Experiment, stage: str | None, console: Console
) -> tuple[list[tuple[str, TextTable]], dict[str, Any]]:
    rows, result = [], {}
    for generation, found in smallest(experiment, stage=stage):
        result[generation] = None if found is None else as_json(found)
        if found is None:
            rows.append([Cell(generation), Cell("none up to the largest", mood="bad"), *[Cell("–")] * 3])
        else:
            size = found.memory.total
            cells = (found.topology, str(found.devices), _gib(size), _ms(found.estimate.seconds))
            rows.append([Cell(generation), *map(Cell, cells)])
        console.print(f"{generation}: {rows[-1][1].text}", style="dim")
    head = ("generation", "smallest slice", "devices", "GiB a device", "a step at least")
    return [("The smallest slice of each generation", TextTable(head, rows))], result


def _search(
    experiment: Experiment, topology: str, slices: int, stage: str | None
) -> tuple[list[tuple[str, TextTable]], dict[str, Any]]:
    found = search(experiment, slice_of(topology, slices), stage=stage)
    rows = [_setting(setting, rehearsal) for setting, rehearsal in found]
    head = ("mesh", "rows", "micro-batches", "remat", "GiB a device", "fits", "a step at least", "known from")
    result = {
        "settings": [
            {"setting": dataclasses.asdict(setting), "rehearsal": as_json(rehearsal)}
            for setting, rehearsal in found
        ]
    }
    return [(f"Settings on {topology}, the best first", TextTable(head, rows))], result


def _setting(setting: Setting, found: Rehearsal) -> Sequence[Cell]:
    compiled = found.memory.temporaries is not None or bool(found.refusal)
    return [
        Cell(setting.mesh.describe()),
        Cell(str(setting.rows)),
        Cell(str(setting.accumulation)),
        Cell(setting.remat),
        Cell(_gib(found.memory.total or found.memory.state)),
        Cell("yes" if found.fits else "no", mood="good" if found.fits else "bad"),
        Cell(_ms(found.estimate.seconds)),
        Cell("the compiler" if compiled else "exact bytes alone"),
    ]


def _on_terminal(title: str, table: TextTable) -> Table:
    result = Table(title=escape(title), title_justify="left")
    for n, name in enumerate(table.head):
        result.add_column(name, justify="left" if n < table.left else "right")
    colours = {"bad": "red", "good": "green"}
    for row in table.rows:
        cells = [
            f"[{colours[c.mood]}]{escape(c.text)}[/]" if c.mood in colours else escape(c.text) for c in row
        ]
        result.add_row(*cells)
    return result
