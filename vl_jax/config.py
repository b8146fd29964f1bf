"""Configuration: frozen dataclasses are the schema, a locked ``ConfigDict`` is the override layer.

    dataclass --view()--> ConfigDict --override()--> ConfigDict --rebuild()--> dataclass

An experiment file builds one frozen dataclass and returns its *view*. Command-line overrides are
applied to the view, which is then rebuilt **once**: every type, choice and ``__post_init__`` rule is
checked on the final values, before any array exists. Code past the command line sees dataclasses only.

A tuple of dataclasses (training stages, data sources) appears in the view as a mapping from name, or from
number where they have none, to element: ``--config.stages.sft.steps=100`` addresses one of them. Of pairs of
name and value one is set by its name, dots and all: ``--config.model.moe.options.k_max=3``. A part that
may be absent is switched on by setting one of its fields, ``--config.data.packing.max_tokens=2048``, and off
by ``=None``. A part of which there are several kinds is exchanged by the name of another class, or where its
field is ``Open`` by ``path/to/file.py:Name``.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from vl_jax import parts
from vl_jax.runtime import errors, shipped
from vl_jax.schema import (
    TYPE_KEY,
    ConfigError,
    classes_of,
    hints_of,
    moved_to,
    no_such_field,
    options_of,
    own_class,
    rebuild,
    to_tree,
)


def view(config: Any):
    """The locked, type-safe ``ConfigDict`` of a config dataclass: what an experiment file returns."""
    from ml_collections import config_dict

    def convert(tree: Any, cls_hints: dict[str, Any]) -> Any:
        # Order is meaning: it is that of the stages.
        result = config_dict.ConfigDict(type_safe=True, sort_keys=False)
        for key, value in tree.items():
            hint = cls_hints.get(key)
            if isinstance(value, dict):
                result[key] = convert(value, hints_of(value))
            elif value is None and _placeholder_type(hint) is not None:
                result[key] = config_dict.placeholder(_placeholder_type(hint))
            else:
                result[key] = value
        return result

    tree = to_tree(config)
    return convert(tree, hints_of(tree)).lock()


def choose(choice: str, *builders: Callable[..., Any]) -> Any:
    """What one of several functions builds: the way for a file to hold several experiments.

    ``--config=FILE:name,option=value`` calls the function ``name``. An option becomes what its default is,
    text or a number.

    Raises:
      ConfigError: there is no such function or option, or the value is of another kind; says which there are.
    """
    name, *options = choice.split(",")
    found = {builder.__name__: builder for builder in builders}
    if name not in found:
        raise ConfigError(f"the file has no experiment {name!r}; it has {', '.join(found)}")
    known, given = inspect.signature(found[name]).parameters, {}
    for option in options:
        key, _, text = option.partition("=")
        if key not in known or "=" not in option:
            there = ", ".join(f"{k}={p.default}" for k, p in known.items()) or "none"
            raise ConfigError(f"experiment {name!r} has no option {option!r}; options and defaults: {there}")
        kind = type(known[key].default)
        try:
            given[key] = kind(text)
        except ValueError:
            raise ConfigError(f"experiment {name!r}, option {option!r}: expected {kind.__name__}") from None
    return found[name](**given)


def override(config_view: Any, path: str, text: str) -> None:
    """Sets one dotted path of a view from command-line text.

    Raises:
      ConfigError: the path does not exist (with the nearest name), or the text has the wrong type.
    """
    node: Any = config_view
    holder: Any = None  # of the node
    hint: Any = None  # of the node, then of what the path names
    path = _moved_path(config_view, path)
    *parents, last = path.split(".")
    for depth, key in enumerate([*parents, last]):
        where = ".".join(["config", *path.split(".")[:depth]])
        if _is_of_pairs(hint):
            name = ".".join([*parents, last][depth:])
            holder[parents[depth - 1]] = (*(p for p in node if p[0] != name), (name, _literal(text)))
            return
        if not hasattr(node, "keys"):
            raise ConfigError(f"{where} is a value, it has no field {key!r}")
        if key not in node or key == TYPE_KEY:
            raise ConfigError(no_such_field(where, key, [k for k in node.keys() if k != TYPE_KEY]))
        hint = hints_of(node).get(key) if TYPE_KEY in node else _element(hint)
        if depth < len(parents):
            if node[key] is None and (part := _optional_part(node, key)) is not None:
                with node.unlocked(), node.ignore_type():
                    node[key] = view(part())
            elif node[key] is None and (kinds := classes_of(options_of(hints_of(node).get(key))[0])):
                raise ConfigError(f"{where}.{key} is None; first set it to one of {', '.join(kinds)}")
            holder, node = node, node[key]
    if hasattr(node[last], "keys") and text == "None" and _may_be_none(node, last):
        with node.ignore_type():
            node[last] = None
        return
    if (part := _named_part(hint, text, f"config.{path}")) is not None:
        if TYPE_KEY not in node and hasattr(part, "name"):  # one of several, which keeps its name
            part = dataclasses.replace(part, name=last)
        with node.unlocked(), node.ignore_type():
            node[last] = view(part)
        return
    if hasattr(node[last], "keys"):
        fields = ", ".join(k for k in node[last].keys() if k != TYPE_KEY)
        raise ConfigError(f"config.{path} is a group, set one of its fields: {fields}")
    value = _parse(text, node, last)
    try:
        node[last] = value
    except TypeError:
        expected = node.get_type(last).__name__
        raise ConfigError(f"config.{path}={text}: expected {expected}") from None


def load(spec: str, overrides: Iterable[tuple[str, str]] = ()) -> Any:
    """Loads an experiment file, applies dotted overrides, and rebuilds the dataclass.

    Args:
      spec: ``file.py`` or ``file.py:argument``, a Python file with ``get_config(argument="")``; or the name
        of an experiment that comes with the package, such as ``quickstart``.
      overrides: pairs of dotted path (without the leading ``config.``) and text.

    Raises:
      ConfigError: the file is missing or fails, or a value breaks a rule; always one line.
    """
    file, _, argument = spec.partition(":")
    path = _file_of(spec)
    module = _execute(path)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"--config={file}: the file defines no get_config()")
    with _errors_of(path):
        result = module.get_config(argument) if argument else module.get_config()
        config_view = view(result) if dataclasses.is_dataclass(result) else result
    if not hasattr(config_view, "is_locked"):  # a dict is no view either
        raise ConfigError(f"--config={file}: get_config() gave {type(result).__name__}, not a config")
    return _overridden(config_view, overrides)


def sweep(spec: str, names: Iterable[str]) -> list[dict[str, str]]:
    """The product of an experiment file's sweeps: the overrides of every run, in order.

    ``sweep_<name>()`` in the file yields one dict of dotted paths and values for each of its variants.

    Raises:
      ConfigError: the file is missing or fails, or it has no sweep of that name.
    """
    path = _file_of(spec)
    module, result = _execute(path), [{}]
    known = _named(module, "sweep_")
    for name in names:
        if name not in known:
            others = ", ".join([*known, *_named(module, "ablation_"), *_named(module, "scaling_")])
            raise ConfigError(f"--sweep={name}: {path} has {others or 'no sweep'}")
        with _errors_of(path):
            variants = [{k: str(v) for k, v in v.items()} for v in getattr(module, f"sweep_{name}")()]
        result = [{**before, **variant} for before in result for variant in variants]
    return result


def functions(spec: str, prefix: str) -> list[str]:
    """The names, behind a prefix, of the functions of an experiment file that have it.

    Raises:
      ConfigError: the file is missing or fails.
    """
    return _named(_execute(_file_of(spec)), prefix)


def call(spec: str, function: str) -> Any:
    """What a function of an experiment file gives.

    Raises:
      ConfigError: the file or the function fails.
    """
    path = _file_of(spec)
    module = _execute(path)
    with _errors_of(path):
        return getattr(module, function)()


def _named(module: ModuleType, prefix: str) -> list[str]:
    return [name.removeprefix(prefix) for name in vars(module) if name.startswith(prefix)]


def _file_of(spec: str) -> Path:
    """The file that a spec names.

    Raises:
      ConfigError: there is no such file and no such experiment.
    """
    name = spec.partition(":")[0]
    path, known = Path(name), shipped.names()
    if path.is_file():
        return path
    if name in known:
        return shipped.path_of(name)
    if path.suffix == ".py":
        beside = [file.name for file in path.parent.glob("*.py")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, n=1)
        hint = f"; did you mean {path.with_name(near[0])}?" if near else ""
        raise ConfigError(f"--config={name}: no such file{hint}")
    raise ConfigError(
        f"--config={name}: no such file, nor an experiment of the package; {parts.near(name, known)}"
    )


def _execute(path: Path) -> ModuleType:
    """An experiment file as a module, run anew: what it names may have changed."""
    with _errors_of(path):
        return parts.run_file(path)


def replace(config: Any, overrides: Iterable[tuple[str, str]]) -> Any:
    """A copy of a config with values changed, given as to ``load``; all its rules are checked again."""
    return _overridden(view(config), overrides)


def _overridden(config_view: Any, overrides: Iterable[tuple[str, str]]) -> Any:
    for dotted, text in overrides:
        override(config_view, dotted, text)
    return rebuild(config_view)


@contextlib.contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Turns whatever an experiment file raises into one line with the place in the file."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise ConfigError(f"--config={errors.in_file(path, error, name=str(path))}") from error


def _is_of_pairs(hint: Any) -> bool:
    """Whether a field holds pairs of name and value, each of which is set by its name."""
    element = _element(hint)
    return typing.get_origin(element) is tuple and typing.get_args(element)[:1] == (str,)


def _element(hint: Any) -> Any:
    """The type of the parts of a tuple; None for anything else."""
    arguments = typing.get_args(hint)
    return arguments[0] if typing.get_origin(hint) is tuple and arguments else None


def _named_part(hint: Any, text: str, path: str) -> Any:
    """The part, with its defaults, that a text names for a field of parts; None where it names none.

    For a tuple of parts of one's own it is the only one.

    Raises:
      ConfigError: the part cannot be made without arguments.
    """
    several = typing.get_origin(hint) is tuple
    options, mark = options_of(_element(hint) if several else hint)
    known = classes_of(options)
    if text in known and not several:
        cls = known[text]
    elif mark is not None and ".py" in text:
        cls = own_class(text, mark, known, path)
    else:
        return None
    try:
        return (cls(),) if several else cls()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}={text}: {error}") from error
    except Exception as error:  # a rule of the part that is wrong itself
        raise ConfigError(f"{path}={text}: {errors.described(error)}") from error


def _placeholder_type(hint: Any) -> type | None:
    """The scalar type of an optional field, or None where a placeholder makes no sense."""
    scalars = [a for a in typing.get_args(hint) if a in (int, float, str, bool)]
    return scalars[0] if scalars else None


def _may_be_none(node: Any, key: str) -> bool:
    return types.NoneType in options_of(hints_of(node).get(key))[0]


def _optional_part(node: Any, key: str) -> type | None:
    """The dataclass of a field that holds one or None, if it can be made without arguments."""
    options, _ = options_of(hints_of(node).get(key))
    classes = [option for option in options if dataclasses.is_dataclass(option)]
    if not _may_be_none(node, key) or len(classes) != 1:
        return None
    given = (dataclasses.MISSING, dataclasses.MISSING)
    if any((f.default, f.default_factory) == given for f in dataclasses.fields(classes[0])):
        return None
    return typing.cast(type, classes[0])


def _parse(text: str, node: Any, key: str) -> Any:
    """Reads command-line text with the type the field has now; strings stay as they are."""
    kind = node.get_type(key)
    if text == "None":
        return None
    if kind is str:
        return text
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    value = _literal(text)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is tuple:
        return tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return value


def _literal(text: str) -> Any:
    """What a text stands for in Python; the text itself where that is nothing."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _moved_path(config_view: Any, path: str) -> str:
    """The path with the fields of earlier versions by the names they have now."""
    node: Any = config_view
    result = []
    for key in path.split("."):
        cls = node.get(TYPE_KEY) if hasattr(node, "keys") else None
        for name in moved_to(cls, key).split("."):
            result.append(name)
            node = node[name] if hasattr(node, "keys") and name in node else None
    return ".".join(result)
