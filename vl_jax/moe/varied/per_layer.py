"""Settings of single layers: sparse layers of one part that differ in scheme, E, K, width or anything else.

    layers = (("0-3.top_k", 1), ("2.num_experts", 8), ("4-.scheme", "hash"))

A pair is a place in the config and its value there, for the layers that stand before the first dot: numbers
from 0 among all layers of the part, ``3``, ``0-3``, ``4-`` to the last, or several with commas between them.
Of two pairs for one layer the later one wins. Layers with equal settings are one stack (see ``stacks``), and
neighbours among them one run, which is scanned.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from vl_jax import config as config_lib
from vl_jax.schema import ConfigError

MoEConfig = Any  # the one of ``routing``, which asks here whether its settings can be


@dataclasses.dataclass(frozen=True)
class Group:
    """Sparse layers with equal settings."""

    moe: MoEConfig  # without ``layers``
    layers: tuple[int, ...]  # their numbers among all layers of the part


def spans_of(name: str) -> tuple[list[tuple[int, int | None]], str]:
    """The layers of a setting, as first and last number (None: to the end), and the place in the config.

    Raises:
      ValueError: it names no layers, or no place.
    """
    numbers, _, place = name.partition(".")
    spans: list[tuple[int, int | None]] = []
    for part in numbers.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or not (last.isdigit() or not last) or not place:
            raise ValueError(
                f"layers: {name!r} must be layers and a field, such as '3.top_k', '0-3.top_k', '4-.top_k' or "
                "'1,3.top_k'"
            )
        spans.append((int(first), int(last) if last else None if dash else int(first)))
    if any(last is not None and last < first for first, last in spans):
        raise ValueError(f"layers: {name!r} has a last layer before its first")
    return spans, place


def _holds(spans: Sequence[tuple[int, int | None]], layer: int) -> bool:
    return any(first <= layer and (last is None or layer <= last) for first, last in spans)


@functools.lru_cache(maxsize=1024)
def settings(moe: MoEConfig, layer: int) -> MoEConfig:
    """The config of one layer, without ``layers``.

    Raises:
      ValueError: a setting names no field, or breaks a rule of the config.
    """
    if not moe.layers:
        return moe
    found = {name: value for name, value in moe.layers if _holds(spans_of(name)[0], layer)}
    own = [(spans_of(name)[1], str(value)) for name, value in found.items()]
    try:
        return config_lib.replace(dataclasses.replace(moe, layers=()), own)
    except ConfigError as error:
        said = str(error).removeprefix("config: ").removeprefix("config.")
        raise ValueError(f"layers: layer {layer} with {', '.join(found)}: {said}") from None


def check(moe: MoEConfig) -> None:
    """Refuses settings that no layer could have.

    Raises:
      ValueError: see ``spans_of`` and ``settings``.
    """
    ends = {0}
    for name, _ in moe.layers:
        spans, place = spans_of(name)
        if place.partition(".")[0] == "layers":
            raise ValueError(f"layers: {name!r} would give a layer layers of its own")
        ends |= {edge for first, last in spans for edge in (first, first if last is None else last)}
    for layer in sorted(ends | {end + 1 for end in ends}):
        settings(moe, layer)


def check_layers(moe: MoEConfig, sparse_layers: Sequence[int], where: str) -> None:
    """Refuses settings for layers that are not there, or have no experts.

    Args:
      where: the path of the config, for the message.

    Raises:
      ValueError: names the setting.
    """
    for name, _ in moe.layers:
        for first, last in spans_of(name)[0]:
            inside = [i for i in sparse_layers if _holds([(first, last)], i)]
            beyond = last is not None and last > max(sparse_layers, default=-1)
            if not inside or beyond:
                raise ValueError(f"{where}.layers: {name!r} is not within the sparse layers {sparse_layers}")


def groups(moe: MoEConfig, sparse_layers: Sequence[int]) -> dict[str, Group]:
    """The layers by equal settings, the main group first: that of the settings without exceptions, if any.

    The main group has the name "", and others are called after the first of their layers.
    """
    found: dict[MoEConfig, list[int]] = {}
    for layer in sparse_layers:
        found.setdefault(settings(moe, layer), []).append(layer)
    usual = dataclasses.replace(moe, layers=()) if moe.layers else moe
    order = sorted(found, key=lambda own: (own != usual, found[own][0]))
    return {
        f"_layer_{found[own][0]}" if place else "": Group(own, tuple(found[own]))
        for place, own in enumerate(order)
    }
