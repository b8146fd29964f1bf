"""What published encoders of texts and sounds have in common: rows of tables, and names of functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vl_jax.interop.rules import STACK, Rule
from vl_jax.interop.vision import ACTIVATIONS
from vl_jax.kernels.activation import FUNCTIONS

Fields = Mapping[str, Any]
# (name of a tensor in the source, path of a parameter of ours, axes, parts if it is made of several)
Row = tuple[str, str, str] | tuple[str, str, str, tuple[str, ...]]


def activation(fields: Fields, name: str) -> Any:
    """Our name of a published non-linearity.

    Raises:
      ValueError: we have none of that kind.
    """
    known = [published for published, ours in ACTIVATIONS.items() if ours in FUNCTIONS]
    if fields[name] not in known:
        raise ValueError(f"{name}={fields[name]!r}: known are {', '.join(known)}")
    return ACTIVATIONS[fields[name]]


def only(fields: Fields, name: str, *allowed: Any) -> None:
    """Refuses options that mean another network.

    Raises:
      ValueError: the field has another value.
    """
    if fields[name] not in allowed:
        raise ValueError(f"{name}={fields[name]!r}: expected {' or '.join(map(repr, allowed))}")


def norm(source: str, target: str) -> tuple[Row, ...]:
    """Scale and bias."""
    return ((f"{source}.weight", f"{target}/scale", "d -> d"), (f"{source}.bias", f"{target}/bias", "d -> d"))


def linear(source: str, target: str) -> tuple[Row, ...]:
    """Kernel and bias."""
    return (
        (f"{source}.weight", f"{target}/kernel", "f d -> d f"),
        (f"{source}.bias", f"{target}/bias", "f -> f"),
    )


def attention(source: str, output: str, parts: tuple[str, str, str]) -> tuple[Row, ...]:
    """Attention whose query, key and value are tensors of their own; ``{part}`` stands in ``source``."""
    return (
        (f"{source}.weight", "attention/qkv", "part (n h) d -> d part n h", parts),
        (f"{source}.bias", "attention/qkv_bias", "part (n h) -> part n h", parts),
        (f"{output}.weight", "attention/project", "d (n h) -> n h d"),
        (f"{output}.bias", "attention/project_bias", "d -> d"),
    )


def outer_rules(rows: Iterable[Row], source: str, target: str) -> tuple[Rule, ...]:
    """Rules of tensors that there is one of, with prefixes before the names of both sides."""
    return tuple(Rule(source + name, target + path, axes, *parts) for name, path, axes, *parts in rows)


def layer_rules(rows: Iterable[Row], source: str, target: str, *, stack: str = STACK) -> tuple[Rule, ...]:
    """Rules of tensors that every layer has; ``{layer}`` stands in ``source``."""
    return tuple(
        Rule(source + name, f"{target}{stack}/{path}", f"layer {axes.replace('->', '-> layer')}", *parts)
        for name, path, axes, *parts in rows
    )
