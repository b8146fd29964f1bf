"""Which runs are the same: one is used again only if nothing differs that its figures come from."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vl_jax import schema
from vl_jax.experiment import Experiment
from vl_jax.train import resume

# Paths that no figure follows from, but for times and the order of sums. All else counts: what is evaluated,
# how often it is logged, where the data is.
NO_MATTER = (
    r"name",
    r"mesh(\..*)?",
    r"data\.loading(\..*)?",
    r"loop\.(watchdog(\..*)?|checkpoint_every|keep_checkpoints)",
    r"(.*\.)?remat",
    r"(.*\.)?execution(\..*)?",
)


def digest(experiment: Experiment) -> str:
    """Eight letters of a resolved experiment; files of one's own that it names count by their content."""
    values = _mattering(json.loads(schema.to_json(experiment)))
    files = {text.rpartition(":")[0] for text in map(str, values.values()) if ".py:" in text}
    values |= {
        f"file {name}": Path(name).read_text(encoding="utf-8") for name in files if Path(name).is_file()
    }
    text = json.dumps(values, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:8]


def difference(folder: Path, experiment: Experiment) -> str | None:
    """What differs first between the run of a folder and a resolved experiment; None if nothing that matters.

    Raises:
      ValueError: the config.json of the folder is damaged.
    """
    try:
        before = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: not valid JSON ({error}); delete the folder") from None
    allowed, refused = resume.changes(before, json.loads(schema.to_json(experiment)))
    changed = [line for line in [*refused, *allowed] if _matters(re.split(r"[ :]", line)[0])]
    return changed[0] if changed else None


def _mattering(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {path: value for path, value in resume.flat(tree).items() if _matters(path)}


def _matters(path: str) -> bool:
    path = path.removeprefix("config.")
    return not any(re.fullmatch(pattern, path) for pattern in NO_MATTER)
