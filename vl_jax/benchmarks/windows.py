"""What attention in windows costs beside attention among all patches: Swin and ViT over sizes of pictures.

Both have 12 blocks: Swin-T, and ViT-S with patches of 16 pixels, which cost the same at 224 pixels. The cost
of Swin grows with the area of the picture, that of ViT in part with its square, so one figure for "cheaper"
says little: there is one for every size.

Operations are those of the products, for one picture. Times are of one picture forward, in turns.
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
import numpy as np

from vl_jax.benchmarks.step import machine, spread
from vl_jax.encoders.swin import SwinConfig
from vl_jax.encoders.vit import ViTConfig
from vl_jax.fit import flops
from vl_jax.report.figure import to_svg
from vl_jax.report.loglog import LogLogPanel, Trace, panels

CLAIMED = 0.6  # "40 % cheaper", as a ratio
SWIN, VIT = "swin", "vit"


@dataclasses.dataclass(frozen=True)
class Curves:
    """What is measured."""

    sides: tuple[int, ...] = (64, 128, 192, 224, 256, 320, 384, 448, 512, 768, 1024)  # pixels
    timed: tuple[int, ...] = (64, 224, 512)  # of those, the ones that are run too
    swin: SwinConfig = SwinConfig()
    vit: ViTConfig = ViTConfig(patch_size=16, embed_dim=384, mlp_dim=1536, num_layers=12, num_heads=6)


def run(*, repeats: int = 9, json_file: Path | None = None, case: Curves | None = None) -> dict[str, Any]:
    """Measures, prints a table and returns the figures.

    Args:
      repeats: turns; medians are reported, with the lowest and the highest.
      json_file: where the figures go too, and beside it a chart, as SVG.

    Raises:
      ValueError: there are no repeats.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: must be at least 1")
    case = case or Curves()
    measured = {str(side): _measure(side, case, repeats) for side in case.sides}
    result = {"benchmark": "windows", "repeats": repeats, "machine": machine(), "measured": measured}
    result["verdict"] = verdict({side: found["ratio"]["flops"] for side, found in measured.items()})
    print(table(result))
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        json_file.with_suffix(".svg").write_text(chart(result), encoding="utf-8")
    return result


def verdict(ratios: dict[str, float]) -> dict[str, Any]:
    """Whether Swin needs 40 % fewer operations, and from which size on, if from any."""
    cheap = [ratio <= CLAIMED for ratio in ratios.values()]
    first = next((side for n, side in enumerate(ratios) if all(cheap[n:])), None)
    word = "holds" if all(cheap) else "holds in part" if any(cheap) else "does not hold"
    return {"claim": "Swin features are 40 % cheaper than those of ViT", "verdict": word, "from": first}


def _measure(side: int, case: Curves, repeats: int) -> dict[str, Any]:
    """Operations of both for one size, their times, and Swin's as ratios to ViT's."""
    swin = dataclasses.replace(case.swin, image_size=side)
    vit = dataclasses.replace(case.vit, image_size=side)
    operations = {SWIN: counted(swin), VIT: counted(vit)}
    found: dict[str, Any] = {name: {"flops": number} for name, number in operations.items()}
    found["ratio"] = {"flops": operations[SWIN] / operations[VIT]}
    if side not in case.timed:
        return found
    programs = {SWIN: _program(swin), VIT: _program(vit)}
    for program in programs.values():
        program()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    for turn in range(repeats):
        for name in sorted(programs, reverse=turn % 2 == 1):
            seconds[name].append(_timed(programs[name]))
    for i, clock in enumerate(("cpu", "wall")):
        one, other = ([times[i] for times in seconds[name]] for name in (SWIN, VIT))
        ratios = [a / b for a, b in zip(one, other, strict=True)]
        for name, values in ((SWIN, one), (VIT, other), ("ratio", ratios)):
            found[name][clock] = spread(values)
    return found


def _program(config: Any) -> Callable[[], Any]:
    """A compiled forward pass on one picture; what is given to it stays on the device."""
    module, pixels = config.build(np.float32), np.zeros((1, *config.input_shape), np.uint8)
    shapes = nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), pixels))
    random = np.random.default_rng(0)
    variables = jax.tree.map(lambda a: 0.02 * random.standard_normal(a.shape, np.float32), shapes)
    function = jax.jit(module.apply)
    given = jax.device_put((variables, pixels))
    return lambda: jax.block_until_ready(function(*given))


def _timed(program: Callable[[], Any]) -> tuple[float, float]:
    """(CPU seconds, wall seconds) of one run."""
    cpu, wall = time.process_time(), time.perf_counter()
    program()
    return time.process_time() - cpu, time.perf_counter() - wall


def counted(config: Any) -> float:
    """Operations of the products of the forward pass on one picture, see ``fit.flops``."""
    module = config.build(np.float32)
    pixels = jax.ShapeDtypeStruct((1, *config.input_shape), np.uint8)
    variables = nn.meta.unbox(jax.eval_shape(lambda x: module.init(jax.random.key(0), x), pixels))
    return flops.count(jax.make_jaxpr(module.apply)(variables, pixels).jaxpr)


def table(result: dict[str, Any]) -> str:
    """The figures as text: medians, and in brackets the lowest and the highest."""

    def cell(found: dict[str, float] | None) -> str:
        if found is None:
            return "-"
        return "{median:.2f} ({lowest:.2f} - {highest:.2f})".format(**found)

    lines = [f"Swin beside ViT, one picture forward, {result['repeats']} turns; ratios are Swin's to ViT's"]
    lines.append(f"{'pixels':>6}{'GFLOP Swin':>12}{'ViT':>8}{'ratio':>7}  {'CPU time':24}wall time")
    for side, found in result["measured"].items():
        swin, vit, ratio = (found[name] for name in (SWIN, VIT, "ratio"))
        flops = f"{swin['flops'] / 1e9:12.2f}{vit['flops'] / 1e9:8.2f}{ratio['flops']:7.2f}"
        lines.append(f"{side:>6}{flops}  {cell(ratio.get('cpu')):24}{cell(ratio.get('wall'))}")
    said = result["verdict"]
    begins = "" if said["from"] is None else f", from {said['from']} pixels on"
    return "\n".join([*lines, f"{said['claim']}: {said['verdict']}{begins}"])


def chart(result: dict[str, Any]) -> str:
    """Both costs over the side of the picture, as SVG."""

    def traces(value: Callable[[dict[str, Any]], float | None]) -> list[Trace]:
        found = []
        for name, said in ((SWIN, "Swin"), (VIT, "ViT")):
            values = {float(side): value(row[name]) for side, row in result["measured"].items()}
            points = [(side, number) for side, number in values.items() if number is not None]
            found.append(Trace(said, points, points))
        return found

    def seconds(row: dict[str, Any]) -> float | None:
        return row["cpu"]["median"] if "cpu" in row else None

    shown = (
        LogLogPanel("operations of one picture, 1e9", "pixels", traces(lambda row: row["flops"] / 1e9)),
        LogLogPanel("CPU seconds of one picture", "pixels", traces(seconds)),
    )
    return to_svg(panels(shown))
