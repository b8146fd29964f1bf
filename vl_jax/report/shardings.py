"""The page of ``inspect params --html``: every parameter, drawn as the mesh cuts it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from html import escape

from vl_jax.report.run import page

_WIDTH, _HEIGHT, _MOST = 120, 40, 32  # pixels of a drawing, and lines that it has at most along one side


@dataclasses.dataclass(frozen=True)
class ParameterRow:
    """What is said of one parameter, or of all of them."""

    path: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]  # logical names; "" for none
    spec: tuple[str, ...]  # axes of the mesh; "" for none
    whole: tuple[str, ...]  # what does not divide, and is kept whole
    parts: tuple[int, ...]  # of each dimension
    size: int  # bytes on one device
    trained: str  # the stages that train it


def render(name: str, rows: Sequence[ParameterRow], totals: tuple[str, str, str]) -> str:
    """The page; the numbers of parameters, mesh and bytes on one device are its first line."""
    number, mesh, size = totals
    head = ("parameter", "drawn", "dimensions", "bytes on a device", "copies", "trained in")
    devices = _devices(mesh)
    cells = "".join(f"<th{' class=num' if n in (3, 4) else ''}>{text}</th>" for n, text in enumerate(head))
    body = "".join(_row(row, devices) for row in rows)
    table = (
        f'<div class="card scroll"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'
    )
    note = (
        '<p class="note">A drawing shows the two dimensions that are cut into most parts, or the last two; '
        "the coloured part is what one device holds. Red: what does not divide, and is whole.</p>"
    )
    lead = f"{number}, {size} bytes of them on one device; mesh {mesh}"
    return page(name, lead, [("Parameters", note + table)], kind="parameters")


def _devices(mesh: str) -> int:
    """Of a mesh in words, such as ``data=1 x fsdp=8``."""
    return math.prod(int(part.partition("=")[2]) for part in mesh.split(" x "))


def _row(row: ParameterRow, devices: int) -> str:
    bad = [name.partition("=")[0] for name in row.whole]
    spec = (*row.spec, *[""] * (len(row.shape) - len(row.spec)))
    sizes = []
    for size, name, axis, parts in zip(row.shape, row.axes, spec, row.parts, strict=True):
        text = escape(f"{size:,} {name}{f' / {parts} ({axis})' if parts > 1 else ''}".strip())
        sizes.append(f'<span class="verdict bad">{text}</span>' if name in bad else text)
    copies = devices // math.prod(row.parts)
    return (
        f"<tr><th><code>{escape(row.path)}</code></th><td>{drawing(row.shape, row.parts)}</td>"
        f"<td>{' × '.join(sizes) or 'scalar'}</td><td class='num'>{row.size:,}</td>"
        f"<td class='num'>{copies:,}</td><td>{escape(row.trained)}</td></tr>"
    )


def drawing(shape: Sequence[int], parts: Sequence[int]) -> str:
    """A rectangle, cut as an array is, with the part of one device."""
    order = sorted(range(len(shape)), key=lambda n: (parts[n], n))[-2:]
    rows, columns = [1, 1, *(parts[n] for n in sorted(order))][-2:]
    lines = "".join(
        f'<path d="M{_WIDTH * n / columns:.1f} 0V{_HEIGHT}"/>' for n in range(1, columns) if columns <= _MOST
    ) + "".join(f'<path d="M0 {_HEIGHT * n / rows:.1f}H{_WIDTH}"/>' for n in range(1, rows) if rows <= _MOST)
    width, height = max(1.0, _WIDTH / columns), max(1.0, _HEIGHT / rows)
    return (
        f'<svg width="{_WIDTH + 2}" height="{_HEIGHT + 2}" viewBox="-1 -1 {_WIDTH + 2} {_HEIGHT + 2}" '
        f'role="img" aria-label="{rows} x {columns} parts" stroke="var(--c1)" fill="none">'
        f'<rect width="{width:.1f}" height="{height:.1f}" fill="var(--c1)"/>'
        f'<rect width="{_WIDTH}" height="{_HEIGHT}"/>{lines}</svg>'
    )
