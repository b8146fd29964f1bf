"""Configs that are changed at random: each one can be built, as shapes, or is answered in one line."""

from __future__ import annotations

import dataclasses
import random
import re
import resource
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from vl_jax.config import load, override, view
from vl_jax.experiment import Experiment, plan
from vl_jax.runtime import errors
from vl_jax.schema import TYPE_KEY, classes_of, hints_of, options_of, rebuild
from vl_jax.sharding import MeshConfig

pytest.importorskip("ml_collections")  # experiment files return its ConfigDict

ROOT = Path(__file__).resolve().parent.parent
SPECS = (
    *("quickstart.py", "my_router.py", "contrastive.py", "easy_vqa.py", "flickr8k.py", "fsdd_digits.py"),
    *("finetune_deepseek_vl2.py", "classification.py:clothing", "classification.py:bccd_cells"),
)
MEMORY = 1 << 20  # KiB that all of it may take
SECONDS = 60.0  # of processor time for one config


def changes(value: Any, hint: Any, chance: random.Random) -> str:
    """A text for a field, sensible or not."""
    options, _ = options_of(hint) if hint is not None else ([], None)
    known = [*classes_of(options), *re.findall(r"'([^']*)'", str(hint) if "Literal" in str(hint) else "")]
    general = ["", "x", "None", "-1", "0", "1.5", "nan", "()", "(1, 2)", "('a',)", "../x", "9" * 30, "é\n"]
    if known and chance.random() < 0.7:
        return chance.choice(known)
    if chance.random() < 0.2:
        return chance.choice(general)
    if isinstance(value, bool):
        return str(not value)
    if isinstance(value, int):
        return str(chance.choice([0, 1, 2, 3, 7, value + 1, 2 * value, value // 2, -value, 10**6, 2**63]))
    if isinstance(value, float):
        return str(chance.choice([0, -1, 0.5, 1, 2.5, -value, 1e30, "inf", value / 3]))
    if isinstance(value, tuple):
        return str(chance.choice([value[:-1], value + value, value[::-1], tuple(reversed(value[:1] * 3))]))
    return chance.choice(general)


def fields(node: Any, hint: Any = None, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted path, value and type of every field of a view, groups included."""
    found, hints = [], hints_of(node) if TYPE_KEY in node else {}
    for name in (n for n in node.keys() if n != TYPE_KEY):
        value, own = node[name], hints.get(name)
        found.append((prefix + name, value, own))
        if hasattr(value, "keys"):
            found += fields(value, own, f"{prefix}{name}.")
    return found


def end_of(spec: str, chance: random.Random, *, shapes: bool) -> tuple[str, list[tuple[str, str]]]:
    """How a changed config ends, and what was changed."""
    tree, pairs = view(load(str(ROOT / "experiments" / spec))), []
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        path, value, hint = chance.choice(fields(tree))
        if chance.random() < 0.03:
            path = chance.choice([path[:-1], f"{path}.x", path.replace(".", "..")])
        pairs.append((path, changes(value, hint, chance)))
    try:
        for path, text in pairs:
            override(tree, path, text)
        experiment = rebuild(tree)
        assert isinstance(experiment, Experiment)
        if not shapes or experiment.init:
            return "taken", pairs
        if not any(path.startswith("mesh") for path, _ in pairs):
            # An experiment's batches need not divide by the eight devices of the tests.
            experiment = dataclasses.replace(experiment, mesh=MeshConfig(data=1, tensor=-1))
        plan(experiment)
        return "built", pairs
    except Exception as error:
        text = errors.one_line(error)
        assert text is not None, f"{spec} {pairs}: {type(error).__name__}: {error}"
        assert len(text.splitlines()) == 1 and text.isprintable(), (pairs, text)
        parts = {part for path, _ in pairs for part in re.findall(r"\w+", path)}
        named = parts & {*re.findall(r"\w+", text)}
        assert named, (spec, pairs, text)
        last = {path.split(".")[-1] for path, _ in pairs}
        return "refused, the field named" if last & named else "refused, its group named", pairs


@pytest.mark.parametrize(("count", "planned"), [(20, 1), pytest.param(200, 10, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_changed_configs_can_be_built_or_are_one_line(count, planned, capsys):
    ends, before = Counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        chance = random.Random(f"config/{number}")
        used = resource.getrusage(resource.RUSAGE_THREAD).ru_utime
        end, pairs = end_of(chance.choice(SPECS), chance, shapes=number < planned)
        taken = resource.getrusage(resource.RUSAGE_THREAD).ru_utime - used
        assert taken < SECONDS, (pairs, taken)
        ends[end] += 1
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < MEMORY, grown
    assert ends["refused, the field named"] > ends["refused, its group named"], ends
    with capsys.disabled():
        print(f"\n{dict(ends)}, {grown >> 10} MiB more")
