"""Configuration: frozen dataclasses are the schema, a locked ``ConfigDict`` is the override layer.

    dataclass --view()--> ConfigDict --override()--> ConfigDict --rebuild()--> dataclass

An experiment file builds one frozen dataclass and returns its *view*. Command-line overrides are
applied to the view, which is then rebuilt **once**: every type, choice and ``__post_init__`` rule is
checked on the final values, before any array exists. Code past the command line sees dataclasses only.

A tuple of dataclasses (training stages, data sources) appears in the view as a mapping from name, or from
number where they have none, to element: ``--config.stages.sft.steps=100`` addresses one of them. A part that
may be absent is switched on by setting one of its fields, ``--config.data.packing.max_tokens=2048``, and off
by ``=None``. A part of which there are several kinds is exchanged by the name of another class, or where its
field is ``Open`` by ``path/to/file.py:Name``.

Files name classes without their modules, so that a class can move: the field says which one is meant. A field
that moved into a group is known by its earlier name, on the command line too, where its class says so in
``MOVED``: ``MOVED: ClassVar = {"num_workers": "loading.num_workers"}``.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import json
import traceback
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

from vl_jax import parts

TYPE_KEY = "_type"


class ConfigError(ValueError):
    """A configuration value that breaks a rule; the message is one line naming path, value and rule."""


@dataclasses.dataclass(frozen=True)
class Open:
    """Marks a field, by ``Annotated``, that also takes a part in a file of one's own (see ``parts``)."""

    kind: str  # of the part, for messages
    needs: tuple[str, ...] = ()  # what its class must have, besides being a frozen dataclass


def to_tree(value: Any) -> Any:
    """Turns a config dataclass into nested plain mappings, each with its class."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            TYPE_KEY: type(value),
            **{f.name: to_tree(getattr(value, f.name)) for f in dataclasses.fields(value)},
        }
    if isinstance(value, tuple) and value and all(_is_part(v) for v in value):
        return {getattr(v, "name", str(i)): to_tree(v) for i, v in enumerate(value)}
    return value


def view(config: Any):
    """The locked, type-safe ``ConfigDict`` of a config dataclass: what an experiment file returns."""
    from ml_collections import config_dict

    def convert(tree: Any, cls_hints: dict[str, Any]) -> Any:
        # Order is meaning: it is that of the stages.
        result = config_dict.ConfigDict(type_safe=True, sort_keys=False)
        for key, value in tree.items():
            hint = cls_hints.get(key)
            if isinstance(value, dict):
                result[key] = convert(value, _hints_of(value))
            elif value is None and _placeholder_type(hint) is not None:
                result[key] = config_dict.placeholder(_placeholder_type(hint))
            else:
                result[key] = value
        return result

    tree = to_tree(config)
    return convert(tree, _hints_of(tree)).lock()


def override(config_view: Any, path: str, text: str) -> None:
    """Sets one dotted path of a view from command-line text.

    Raises:
      ConfigError: the path does not exist (with the nearest name), or the text has the wrong type.
    """
    node: Any = config_view
    hint: Any = None  # of the node, then of what the path names
    path = _moved_path(config_view, path)
    *parents, last = path.split(".")
    for depth, key in enumerate([*parents, last]):
        where = ".".join(["config", *path.split(".")[:depth]])
        if not hasattr(node, "keys"):
            raise ConfigError(f"{where} is a value, it has no field {key!r}")
        if key not in node or key == TYPE_KEY:
            raise ConfigError(_unknown(where, key, [k for k in node.keys() if k != TYPE_KEY]))
        hint = _hints_of(node).get(key) if TYPE_KEY in node else _element(hint)
        if depth < len(parents):
            if node[key] is None and (part := _optional_part(node, key)) is not None:
                with node.unlocked(), node.ignore_type():
                    node[key] = view(part())
            elif node[key] is None and (kinds := _classes(_options(_hints_of(node).get(key))[0])):
                raise ConfigError(f"{where}.{key} is None; first set it to one of {', '.join(kinds)}")
            node = node[key]
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


def rebuild(tree: Any, cls: Any = None, path: str = "config") -> Any:
    """Rebuilds the dataclass from a view or a parsed JSON tree, checking every type and rule.

    Args:
      cls: the class it is to be; None takes that of a view.

    Raises:
      ConfigError: one line with the dotted path, the value and the rule it breaks.
    """
    if cls is None:
        cls = tree.get(TYPE_KEY) if hasattr(tree, "keys") else None
        if not isinstance(cls, type):
            raise ConfigError(f"{path}: expected a mapping with its class under {TYPE_KEY!r}")
    return _build(tree, cls, path)


def to_json(config: Any) -> str:
    """The resolved config as JSON; ``from_json`` rebuilds an equal dataclass without the experiment file."""
    return json.dumps(to_tree(config), indent=2, ensure_ascii=False, default=parts.spec_of) + "\n"


def from_json(text: str, cls: Any) -> Any:
    """Rebuilds a config dataclass of the given class from the JSON that ``to_json`` wrote."""
    return rebuild(json.loads(text), cls)


def load(spec: str, overrides: Iterable[tuple[str, str]] = ()) -> Any:
    """Loads ``file.py`` or ``file.py:argument``, applies dotted overrides, and rebuilds the dataclass.

    Args:
      spec: path of a Python file with ``get_config(argument="")``, optionally followed by ``:argument``.
      overrides: pairs of dotted path (without the leading ``config.``) and text.

    Raises:
      ConfigError: the file is missing or fails, or a value breaks a rule; always one line.
    """
    file, _, argument = spec.partition(":")
    path, module = Path(file), _execute(Path(file))
    if not hasattr(module, "get_config"):
        raise ConfigError(f"--config={file}: the file defines no get_config()")
    with _errors_of(path):
        result = module.get_config(argument) if argument else module.get_config()
    config_view = view(result) if dataclasses.is_dataclass(result) else result
    if not hasattr(config_view, "keys"):
        raise ConfigError(f"--config={file}: get_config() gave {type(result).__name__}, not a config")
    return _overridden(config_view, overrides)


def sweep(spec: str, names: Iterable[str]) -> list[dict[str, str]]:
    """The product of an experiment file's sweeps: the overrides of every run, in order.

    ``sweep_<name>()`` in the file yields one dict of dotted paths and values for each of its variants.

    Raises:
      ConfigError: the file is missing or fails, or it has no sweep of that name.
    """
    path = Path(spec.partition(":")[0])
    module, result = _execute(path), [{}]
    known = [name.removeprefix("sweep_") for name in vars(module) if name.startswith("sweep_")]
    for name in names:
        if name not in known:
            raise ConfigError(f"--sweep={name}: {path} has {', '.join(known) or 'no sweep'}")
        with _errors_of(path):
            variants = [{k: str(v) for k, v in v.items()} for v in getattr(module, f"sweep_{name}")()]
        result = [{**before, **variant} for before in result for variant in variants]
    return result


def _execute(path: Path) -> ModuleType:
    """An experiment file as a module, run anew: what it names may have changed."""
    if not path.is_file():
        raise ConfigError(f"--config={path}: no such file")
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
    except Exception as error:
        places = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else (places[-1] if places else None)
        where = str(path) if line is None else f"{path}:{line}"
        raise ConfigError(f"--config={where}: {type(error).__name__}: {error}") from error


def _is_part(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _hints_of(tree: Any) -> dict[str, Any]:
    """Types of the fields of a tree's class; empty for a mapping of named parts."""
    cls = tree.get(TYPE_KEY)
    return typing.get_type_hints(cls, include_extras=True) if isinstance(cls, type) else {}


def _options(hint: Any) -> tuple[list[Any], Open | None]:
    """The types that a field allows, one by one, and its mark if it is open."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        options, mark = _options(args[0])
        return options, next((m for m in args[1:] if isinstance(m, Open)), mark)
    if origin in (typing.Union, types.UnionType):
        found = [_options(arg) for arg in args]
        mark = next((mark for _, mark in found if mark is not None), None)
        return [option for options, _ in found for option in options], mark
    return [hint], None


def _classes(options: Iterable[Any]) -> dict[str, type]:
    """The config classes among the types that a field allows, by name."""
    return {o.__name__: o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)}


def _class_of(name: Any, hint: Any, path: str) -> type:
    """The config class that a tree names under ``_type``, provided that the field allows it.

    Earlier versions wrote ``module:Class``; the class is meant, wherever it is now.
    """
    options, mark = _options(hint)
    classes = _classes(options)
    if isinstance(name, str) and not name.partition(":")[0].endswith(".py"):
        short = name.rpartition(":")[2]
        if short in classes:
            return classes[short]
    elif isinstance(name, type) and name in classes.values():
        return name
    elif mark is not None:
        return _own_class(name, mark, classes, path)
    shown = name.__name__ if isinstance(name, type) else name
    raise ConfigError(f"{path}: class {shown} is not one of {', '.join(classes)}")


def _own_class(name: Any, mark: Open, known: Iterable[str], path: str) -> type:
    """A class in a user's file, checked to be a part of its kind."""
    try:
        cls = parts.find(name, known, kind=mark.kind) if isinstance(name, str) else name
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(cls, type) or not dataclasses.is_dataclass(cls):
        raise ConfigError(f"{path}={name}: expected a frozen dataclass, found {type(cls).__name__}")
    # What the class itself has, not its metaclass, which has a __call__. A field without a default is no
    # attribute.
    found = {*dir(cls), *(f.name for f in dataclasses.fields(cls))}
    missing = [need for need in mark.needs if need not in found]
    if missing:
        raise ConfigError(f"{path}: {cls.__name__} is no {mark.kind}: it has no {missing[0]}")
    return cls


def _element(hint: Any) -> Any:
    """The type of the parts of a tuple; None for anything else."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None


def _named_part(hint: Any, text: str, path: str) -> Any:
    """The part, with its defaults, that a text names for a field of parts; None where it names none.

    For a tuple of parts of one's own it is the only one.

    Raises:
      ConfigError: the part cannot be made without arguments.
    """
    several = typing.get_origin(hint) is tuple
    options, mark = _options(_element(hint) if several else hint)
    known = _classes(options)
    if text in known and not several:
        cls = known[text]
    elif mark is not None and ".py" in text:
        cls = _own_class(text, mark, known, path)
    else:
        return None
    try:
        return (cls(),) if several else cls()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}={text}: {error}") from None


def _placeholder_type(hint: Any) -> type | None:
    """The scalar type of an optional field, or None where a placeholder makes no sense."""
    scalars = [a for a in typing.get_args(hint) if a in (int, float, str, bool)]
    return scalars[0] if scalars else None


def _may_be_none(node: Any, key: str) -> bool:
    return types.NoneType in _options(_hints_of(node).get(key))[0]


def _optional_part(node: Any, key: str) -> type | None:
    """The dataclass of a field that holds one or None, if it can be made without arguments."""
    options, _ = _options(_hints_of(node).get(key))
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
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is tuple:
        return tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return value


def _moved_path(config_view: Any, path: str) -> str:
    """The path with the fields of earlier versions by the names they have now."""
    node: Any = config_view
    result = []
    for key in path.split("."):
        cls = node.get(TYPE_KEY) if hasattr(node, "keys") else None
        for name in _moved_to(cls, key).split("."):
            result.append(name)
            node = node[name] if hasattr(node, "keys") and name in node else None
    return ".".join(result)


def _moved_to(cls: Any, key: str) -> str:
    """Where a class has a field that it had under another name; ``MOVED`` of the class says so."""
    return getattr(cls, "MOVED", {}).get(key, key)


def _with_moved(value: Any, cls: type, path: str) -> dict[str, Any]:
    """The fields of a tree, those of earlier versions in the groups they are in now."""
    result = {key: value[key] for key in value.keys() if _moved_to(cls, key) == key}
    for key in value.keys() - result.keys():
        group, name = _moved_to(cls, key).split(".")
        fields = result.get(group, {})
        if not hasattr(fields, "keys"):
            raise ConfigError(f"{path}.{group}={fields!r}: expected a mapping")
        result[group] = {**fields, name: value[key]}
    return result


def _unknown(where: str, key: str, names: list[str]) -> str:
    near = difflib.get_close_matches(key, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "fields: " + ", ".join(names)
    return f"{where} has no field {key!r}; {hint}"


def _build(value: Any, hint: Any, path: str) -> Any:
    """Checks ``value`` against a type hint and returns it as that type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType, Annotated):
        return _build_union(value, hint, path)
    if origin is Literal:
        if value not in args:
            allowed = ", ".join(map(repr, args))
            raise ConfigError(f"{path}={value!r}: expected one of {allowed}")
        return value
    if dataclasses.is_dataclass(hint):
        if hasattr(value, "keys") and TYPE_KEY in value:
            _class_of(value[TYPE_KEY], hint, path)
        return _build_dataclass(value, hint, path)
    if origin is tuple:
        if hasattr(value, "items"):
            return tuple(_build(v, args[0], f"{path}.{k}") for k, v in value.items())
        if not isinstance(value, (tuple, list)):
            raise ConfigError(f"{path}={value!r}: expected a tuple")
        inner = (args[0],) * len(value) if len(args) == 2 and args[1] is Ellipsis else args
        if len(inner) != len(value):
            raise ConfigError(f"{path}={value!r}: expected {len(inner)} values")
        return tuple(_build(v, h, f"{path}[{i}]") for i, (v, h) in enumerate(zip(value, inner, strict=True)))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, bool) or not isinstance(value, hint):
        raise ConfigError(f"{path}={value!r}: expected {hint.__name__}")
    return value


def _build_union(value: Any, hint: Any, path: str) -> Any:
    options, mark = _options(hint)
    if value is None and types.NoneType in options:
        return None
    if hasattr(value, "keys") and (_classes(options) or mark is not None):
        name = value[TYPE_KEY] if TYPE_KEY in value else None  # pyright: ignore[reportOptionalSubscript, reportOperatorIssue]
        if name is None:
            raise ConfigError(f"{path}: expected a mapping with its class under {TYPE_KEY!r}")
        return _build_dataclass(value, _class_of(name, hint, path), path)
    errors = []
    for option in options:
        if option is not types.NoneType:
            try:
                return _build(value, option, path)
            except ConfigError as error:
                errors.append(error)
    raise errors[0]


def _build_dataclass(value: Any, cls: Any, path: str) -> Any:
    if not hasattr(value, "keys"):
        raise ConfigError(f"{path}={value!r}: expected the fields of {cls.__name__}")
    hints = typing.get_type_hints(cls, include_extras=True)
    names = [f.name for f in dataclasses.fields(cls)]
    value = _with_moved(value, cls, path)
    for key in value.keys():
        if key != TYPE_KEY and key not in names:
            raise ConfigError(_unknown(path, key, names))
    fields = {n: _build(value[n], hints[n], f"{path}.{n}") for n in names if n in value}
    try:
        return cls(**fields)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from None
