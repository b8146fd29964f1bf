"""Frozen dataclasses as the schema of a configuration: trees of plain values in, checked instances out.

    dataclass --to_json()--> JSON --from_json()--> dataclass

A class is named without its module, so that it can move: the field says which one is meant. Where its field
is ``Open``, ``path/to/file.py:Name`` names a part of one's own. A field that moved into a group is known by
its earlier name, on the command line too, where its class says so in ``MOVED``:
``MOVED: ClassVar = {"num_workers": "loading.num_workers"}``.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from vl_jax import parts
from vl_jax.runtime.errors import UserError, described

TYPE_KEY = "_type"


class ConfigError(UserError):
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


def _is_part(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def hints_of(tree: Any) -> dict[str, Any]:
    """Types of the fields of a tree's class; empty for a mapping of named parts."""
    cls = tree.get(TYPE_KEY)
    return _types_of(cls) if isinstance(cls, type) else {}


def _types_of(cls: type) -> dict[str, Any]:
    """The types of a class's fields.

    Raises:
      ConfigError: one of them cannot be read, which happens to a class in a user's file.
    """
    try:
        return typing.get_type_hints(cls, include_extras=True)
    except Exception as error:  # whatever an annotation can raise
        raise ConfigError(
            f"class {cls.__name__}: a type of its fields cannot be read: {described(error)}"
        ) from None


def options_of(hint: Any) -> tuple[list[Any], Open | None]:
    """The types that a field allows, one by one, and its mark if it is open."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        options, mark = options_of(args[0])
        return options, next((m for m in args[1:] if isinstance(m, Open)), mark)
    if origin in (typing.Union, types.UnionType):
        found = [options_of(arg) for arg in args]
        mark = next((mark for _, mark in found if mark is not None), None)
        return [option for options, _ in found for option in options], mark
    return [hint], None


def classes_of(options: Iterable[Any]) -> dict[str, type]:
    """The config classes among the types that a field allows, by name."""
    return {o.__name__: o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)}


def _class_of(name: Any, hint: Any, path: str) -> type:
    """The config class that a tree names under ``_type``, provided that the field allows it.

    Earlier versions wrote ``module:Class``; the class is meant, wherever it is now.
    """
    options, mark = options_of(hint)
    classes = classes_of(options)
    if isinstance(name, str) and not name.partition(":")[0].endswith(".py"):
        short = name.rpartition(":")[2]
        if short in classes:
            return classes[short]
    elif isinstance(name, type) and name in classes.values():
        return name
    elif mark is not None:
        return own_class(name, mark, classes, path)
    shown = name.__name__ if isinstance(name, type) else name
    raise ConfigError(f"{path}: class {shown} is not one of {', '.join(classes)}")


def own_class(name: Any, mark: Open, known: Iterable[str], path: str) -> type:
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


def moved_to(cls: Any, key: str) -> str:
    """Where a class has a field that it had under another name; ``MOVED`` of the class says so."""
    return getattr(cls, "MOVED", {}).get(key, key)


def _with_moved(value: Any, cls: type, path: str) -> dict[str, Any]:
    """The fields of a tree, those of earlier versions in the groups they are in now."""
    result = {key: value[key] for key in value.keys() if moved_to(cls, key) == key}
    for key in value.keys() - result.keys():
        group, name = moved_to(cls, key).split(".")
        fields = result.get(group, {})
        if not hasattr(fields, "keys"):
            raise ConfigError(f"{path}.{group}={fields!r}: expected a mapping")
        result[group] = {**fields, name: value[key]}
    return result


def no_such_field(where: str, key: str, names: list[str]) -> str:
    """The message about a name that is not among the fields."""
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
    if hint is int and isinstance(value, bool) or not _is_of(value, hint, path):
        raise ConfigError(f"{path}={value!r}: expected {hint.__name__}")
    return value


def _is_of(value: Any, hint: Any, path: str) -> bool:
    try:
        return isinstance(value, hint)
    except TypeError:
        raise ConfigError(
            f"{path}: a field of type {hint} cannot be configured; use bool, int, float, str, Literal, a "
            "frozen dataclass, a tuple of these, or one of these or None"
        ) from None


def _build_union(value: Any, hint: Any, path: str) -> Any:
    options, mark = options_of(hint)
    if value is None and types.NoneType in options:
        return None
    if hasattr(value, "keys") and (classes_of(options) or mark is not None):
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
    hints = _types_of(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    value = _with_moved(value, cls, path)
    for key in value.keys():
        if key != TYPE_KEY and key not in names:
            raise ConfigError(no_such_field(path, key, names))
    fields = {n: _build(value[n], hints[n], f"{path}.{n}") for n in names if n in value}
    try:
        return cls(**fields)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    except Exception as error:  # a rule that is wrong itself, most likely one of the user's own
        raise ConfigError(f"{path}: {described(error)}") from error
