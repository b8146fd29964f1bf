"""The package's layering, checked on the source text: nothing is imported."""

from __future__ import annotations

import ast
import functools
import statistics
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "vl_jax"

# A module may import from its own level and from those before it.
LEVELS = (
    "config schema batch params roles parts kernels runtime",
    "sharding losses metrics data",
    "nn",
    "moe",
    "encoders fusion language heads",
    "model joint",
    "layout checkpoint interop compress generation",
    "train evaluate serving export",
    "experiment",
    "fit",
    "runs report benchmarks",
    "ablation",
    "sweep ask",
    "api kits",
    "commands",
    "cli",
    "__main__",
)
# The same inside ``data``.
DATA_LEVELS = (
    "levels",
    "picture",
    "sample reasons",
    "files",
    "text",
    "images media",
    "sources",
    "example config",
    "encode collate",
    "published stream",
    "tools",
)
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names.split()}
DATA_LEVEL_OF = {name: level for level, names in enumerate(DATA_LEVELS) for name in names.split()}

# Packages missing on some platforms, and the modules that may import them at the top of the file. Everything
# else has to be importable without them, so it may not import those modules at its top either.
OPTIONAL = {
    "grain": {f"{PACKAGE}.data.stream.pipeline"},
    "tensorflow_datasets": set(),
    "ml_collections": set(),
    "pyarrow": set(),
    "array_record": set(),
    "faster_coco_eval": set(),
    "jiwer": set(),
    "lmms_eval": set(),
    "nibabel": set(),
    "pydicom": set(),
    "rapidfuzz": set(),
    "sacrebleu": set(),
    "sklearn": set(),
    "vlmeval": set(),
}


def _sources() -> dict[str, Path]:
    result = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        result[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return result


SOURCES = _sources()


@functools.cache
def _trees() -> dict[str, ast.Module]:
    """Every module, parsed once."""
    return {n: ast.parse(path.read_text(encoding="utf-8"), str(path)) for n, path in SOURCES.items()}


@functools.cache
def _nodes() -> tuple[ast.AST, ...]:
    """The nodes of all modules."""
    return tuple(node for tree in _trees().values() for node in ast.walk(tree))


def _imports(tree: ast.Module, *, top_level: bool) -> set[str]:
    """Dotted names a file imports: modules of this package, and roots of others."""
    nodes = list(ast.walk(tree))
    if top_level:
        functions = (n for n in nodes if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))
        inner = {id(child) for function in functions for child in ast.walk(function)}
        nodes = [n for n in nodes if id(n) not in inner]
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used in this package"
            assert node.module is not None
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                names.add(submodule if submodule in SOURCES else node.module)
    return {name if name.split(".")[0] == PACKAGE else name.split(".")[0] for name in names}


@functools.cache
def _graph(*, top_level: bool) -> dict[str, set[str]]:
    return {name: _imports(tree, top_level=top_level) for name, tree in _trees().items()}


def _level(name: str, package: str, levels: dict[str, int]) -> int | None:
    """The level of a module below ``package``; None for other modules, and for the package itself."""
    inner = name.removeprefix(f"{package}.")
    return None if inner == name else levels.get(inner.split(".")[0])


ROOMS = ((PACKAGE, LEVEL_OF), (f"{PACKAGE}.data", DATA_LEVEL_OF))


@pytest.mark.parametrize(("package", "levels"), ROOMS)
def test_every_module_has_a_level(package: str, levels: dict[str, int]):
    inside = {name for name in SOURCES if name.startswith(f"{package}.")}
    missing = {name for name in inside if _level(name, package, levels) is None}
    assert not missing, f"give these a level: {sorted(missing)}"


@pytest.mark.parametrize(("package", "levels"), ROOMS)
@pytest.mark.slow
def test_no_module_imports_from_a_higher_level(package: str, levels: dict[str, int]):
    upward = []
    for name, targets in _graph(top_level=False).items():
        here = _level(name, package, levels)
        for target in targets:
            there = _level(target, package, levels)
            if here is not None and there is not None and there > here:
                upward.append(f"{name} imports {target}")
    assert not upward, "\n".join(sorted(upward))


def test_folders_and_files_stay_small():
    """A folder has at most 20 files, and half of all files at most 150 lines."""
    folders = Counter(path.parent for path in SOURCES.values())
    assert max(folders.values()) <= 20, folders.most_common(1)
    lines = [len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES.values()]
    assert statistics.median(lines) <= 150


def test_no_class_has_the_name_of_another():
    names = Counter(node.name for node in _nodes() if isinstance(node, ast.ClassDef))
    assert not [name for name, count in names.items() if count > 1]


# Models as they were published have the fields they have.
PUBLISHED = ("ViTConfig", "SAMConfig", "TextEncoderConfig")


def test_functions_and_classes_stay_small():
    """A function has at most 80 lines, a class at most 15 fields."""
    functions = [n for n in _nodes() if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert not [f.name for f in functions if (f.end_lineno or 0) - f.lineno >= 80]
    fields = {
        n.name: [
            f for f in n.body if isinstance(f, ast.AnnAssign) and "ClassVar" not in ast.unparse(f.annotation)
        ]
        for n in _nodes()
        if isinstance(n, ast.ClassDef)
    }
    assert not {name for name, found in fields.items() if len(found) > 15} - {*PUBLISHED}


def test_values_can_be_checked_against_every_protocol():
    """As the type checks of the tests do where a function takes or gives one."""
    protocols = [
        n
        for n in _nodes()
        if isinstance(n, ast.ClassDef) and any("Protocol" in ast.unparse(base) for base in n.bases)
    ]
    unchecked = [n.name for n in protocols if "runtime_checkable" not in map(ast.unparse, n.decorator_list)]
    assert protocols and not unchecked


def test_imports_form_no_cycle():
    graph = _graph(top_level=False)
    # The root names public things from every level; it resolves them on first use.
    own = {name: {t for t in targets if t in SOURCES} for name, targets in graph.items() if name != PACKAGE}
    for name, targets in own.items():
        targets -= {name, PACKAGE}
    try:
        TopologicalSorter(own).prepare()
    except CycleError as error:
        pytest.fail("circular import: " + " -> ".join(reversed(error.args[1])))


@pytest.mark.parametrize("package", OPTIONAL)
def test_package_imports_without_optional_dependency(package: str):
    graph, allowed = _graph(top_level=True), OPTIONAL[package]
    for start in SOURCES:
        if start in allowed:
            continue
        chains = [[start]]
        seen = {start}
        while chains:
            chain = chains.pop()
            for target in graph.get(chain[-1], set()) - seen:
                assert target != package, f"{package} is imported by " + " <- ".join(reversed(chain))
                seen.add(target)
                # Importing a module runs the __init__ of every package it is in.
                parents = [target.rsplit(".", n)[0] for n in range(1, target.count(".") + 1)]
                chains += [[*chain, module] for module in [target, *parents] if module in SOURCES]


def test_import_order_rules_catch_a_violation():
    tree = ast.parse("import grain\nfrom vl_jax import cli\ndef f():\n    import ml_collections\n")
    everywhere = _imports(tree, top_level=False)
    assert everywhere == {"grain", "ml_collections", "vl_jax.cli" if "vl_jax.cli" in SOURCES else "vl_jax"}
    assert "ml_collections" not in _imports(tree, top_level=True)
