"""Runs notebooks without Jupyter: their cells in order, and what they show.

    python tests/notebooks.py docs/notebooks/own_images.ipynb

runs one in an empty folder, as it stands, and stores what its cells show. It needs matplotlib.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Output = dict[str, Any]


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells with code, in order."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(notebook: dict[str, Any], name: str) -> Iterator[list[Output]]:
    """What each cell shows, as a notebook holds it: text, figures, and the value of its last line."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(code_cells(notebook), start=1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            source = "".join(cell["source"])
            value = _value(ast.parse(source), names, f"{name}, cell {number}")
        text = [{"output_type": "stream", "name": "stdout", "text": printed.getvalue().splitlines(True)}]
        value = None if source.rstrip().endswith(";") else value
        yield [*(text if printed.getvalue() else []), *_figures(), *_shown(value, number)]


def _value(tree: ast.Module, names: dict[str, Any], place: str) -> Any:
    """Runs a cell; gives the value of its last line, if that is an expression."""
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, place, "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), place, "eval"), names)


def _figures() -> list[Output]:
    """The open figures of matplotlib, which are closed."""
    from matplotlib import pyplot

    found = []
    for number in pyplot.get_fignums():
        buffer = io.BytesIO()
        pyplot.figure(number).savefig(buffer, format="png", dpi=72, metadata={"Software": None})
        data = {"image/png": base64.b64encode(buffer.getvalue()).decode()}
        found.append({"output_type": "display_data", "data": data, "metadata": {}})
    pyplot.close("all")
    return found


def _shown(value: Any, number: int) -> list[Output]:
    if value is None:
        return []
    data = {"text/plain": repr(value).splitlines(True)}
    return [{"output_type": "execute_result", "execution_count": number, "data": data, "metadata": {}}]


def store(path: Path) -> None:
    """Runs a notebook in an empty folder, and stores what its cells show."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    target = path.resolve()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for number, shown in enumerate(run(notebook, path.name), start=1):
            code_cells(notebook)[number - 1].update(execution_count=number, outputs=shown)
    target.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"
    store(Path(sys.argv[1]))
