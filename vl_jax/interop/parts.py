"""Published encoders as the beginning of single parts of a model, a folder for each part.

    config.init_parts=(("image/trunk", "resnet-18"), ("image/vit", "siglip-base-patch16-224"))

A part is an encoder of the model, or what its config calls ``parts``; its path is that of its module. What
the folder has beside is left out: the stages behind a trunk, the head of a classifier, a tower for text. What
no published model has begins as it would without: the projection of cells, the experts of sparse blocks.
Positions are resized to the grid. All else has to fit.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vl_jax import params as params_lib
from vl_jax.interop import rules
from vl_jax.interop.folder import open_weights, read_config
from vl_jax.interop.part_kinds import KIND_OF, NAMES, Stacks, name_of
from vl_jax.interop.safetensors import WeightsError
from vl_jax.joint import JointConfig
from vl_jax.layout import Layout, Variables
from vl_jax.model import ENCODER, VisionLanguageConfig
from vl_jax.runtime.storage import buckets

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PublishedPart:
    """A part of a model, and the published encoder that it begins with."""

    path: str  # of its module
    config: Any  # ours
    fresh: tuple[str, ...]  # paths of parameters of it that no published model has
    folder: Path
    fields: Mapping[str, Any]  # the published config
    published: Any  # the same as one of ours


def places(model: Any) -> dict[str, tuple[Any, tuple[str, ...]]]:
    """What published encoders can be read into, by path: the config, and what of it nobody publishes."""
    encoders: dict[str, Any] = {}
    if isinstance(model, JointConfig):
        encoders = {tower.name: tower.encoder for tower in model.towers}
    elif isinstance(model, VisionLanguageConfig):
        encoders = {ENCODER: model.encoder}
    found: dict[str, tuple[Any, tuple[str, ...]]] = {}
    for name, encoder in encoders.items():
        if type(encoder) in KIND_OF:
            found[name] = (encoder, ())
        found |= {f"{name}/{part}": place for part, place in getattr(encoder, "parts", {}).items()}
    return found


def find(model: Any, named: Sequence[tuple[str, str]]) -> tuple[PublishedPart, ...]:
    """The parts of a model and the folders that are named for them; no weight is read.

    Raises:
      ValueError: there is no such part or folder, or what the folder holds is another network; one line.
    """
    known, found = places(model), []
    for path, name in named:
        where, folder = f"config.init_parts: {path!r}", buckets.here(name)
        if path not in known:
            raise ValueError(f"{where} is no part of the model; there are: {', '.join(known) or 'none'}")
        if any(path == part.path for part in found):
            raise ValueError(f"{where} is named twice")
        if not folder.is_dir():
            raise ValueError(f"{where}: no folder {name}")
        kind, (name_found, fields) = KIND_OF[type(known[path][0])], _encoder_of(read_config(folder))
        if name_found not in kind.names:
            raise ValueError(f"{where}: {name} holds a {name_found!r}, expected {' or '.join(kind.names)}")
        try:
            published = kind.read(fields)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{where}: {name}: {error}") from None
        part = PublishedPart(path, *known[path], folder, fields, published)
        wrong = next(kind.differences(part.config, published), None)
        if wrong is not None:
            field, ours, theirs = wrong
            raise ValueError(f"{where} has {field}={ours!r}, the {name_found} of {name} has {theirs!r}")
        found.append(part)
    return tuple(found)


def _encoder_of(fields: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Model type and config of the encoder of pictures, which may be one of several parts of a checkpoint."""
    kind, inner = name_of(fields), fields.get("vision_config")
    if kind in NAMES or not isinstance(inner, Mapping):
        return kind, fields
    kind = str(inner.get("model_type") or f"{kind}_vision_model")
    return kind, {**inner, "model_type": kind}


def load(variables: Variables, layout: Layout, parts: Sequence[PublishedPart]) -> Variables:
    """The variables with those parts in place, each leaf where it lives.

    Raises:
      ValueError: a tensor is missing or has another shape; one line that names part, tensor and shapes.
    """
    leaves: dict[str, jax.Array] = {}
    for part in parts:
        leaves |= _read(part, layout)
    tree = {"params": variables.params, **variables.collections}
    tree = params_lib.unflatten({**params_lib.flatten(tree), **leaves})
    collections = {name: tree[name] for name in variables.collections}
    return variables._replace(params=tree["params"], collections=collections)


def _read(part: PublishedPart, layout: Layout) -> dict[str, jax.Array]:
    """The leaves of a part, by path in the tree of parameters and collections."""
    targets = params_lib.flatten({"params": layout.params, **layout.collections})
    own = {path: leaf for path, leaf in targets.items() if _inside(path, part)}
    fitted = KIND_OF[type(part.config)].positions
    positions = f"params/{part.path}/positions" if fitted is not None else ""
    table, stacks = _rules(part, weights := open_weights(part.folder))
    wanted = {path: leaf for path, leaf in own.items() if path != positions and not _is_fresh(path, part)}
    plan = rules.plan(table, {path: tuple(leaf.shape) for path, leaf in wanted.items()}, stacks)
    try:
        tree = rules.read(plan, weights, params_lib.unflatten(wanted), ignored=(".*",))
    except WeightsError as error:
        _, first, *more = str(error).splitlines()
        others = f" (and {len(more)} more)" if more else ""
        raise ValueError(f"config.init_parts: {part.path!r} from {part.folder}: {first}{others}") from None
    found = params_lib.flatten(tree)
    if positions in own and fitted is not None:
        source = next(rule.source for rule in table if rule.target == positions)
        if source not in weights:
            raise ValueError(f"config.init_parts: {part.path!r} from {part.folder}: {source} is missing")
        table_of_ours = fitted(np.asarray(weights[source]), part.published, part.config)
        found[positions] = jax.device_put(table_of_ours, own[positions].sharding)
    used = {key for leaf in plan.leaves for _, key in leaf.sources()}
    logger.info(
        "init: %s begins with %s: %d leaves, %s afresh; %d tensors of it are left out",
        *(part.path, part.folder, len(found)),
        ", ".join(sorted(_short(own.keys() - found.keys(), part))) or "none",
        len(weights.keys() - used) - (positions in own),
    )
    return found


def _inside(path: str, part: PublishedPart) -> bool:
    return path.partition("/")[2].startswith(f"{part.path}/")


def _short(paths: Any, part: PublishedPart) -> set[str]:
    """The modules of a part that hold some of its leaves."""
    return {path.partition("/")[2].removeprefix(f"{part.path}/").rpartition("/")[0] for path in paths}


def _is_fresh(path: str, part: PublishedPart) -> bool:
    """Whether a leaf is one that no published model has."""
    name = path.removeprefix(f"params/{part.path}/")
    stack = part.config.stack
    experts = [f"{'/'.join(run)}/" for run in stack.runs] if stack is not None else []
    return name in part.fresh or any(name.startswith(beginning) for beginning in experts)


def _rules(part: PublishedPart, keys: Mapping[str, Any]) -> tuple[tuple[rules.Rule, ...], Stacks]:
    """The rules of a part, and the layers of its stacks."""
    try:
        return KIND_OF[type(part.config)].rules(part.config, part.path, part.fields, keys)
    except ValueError as error:
        raise ValueError(f"config.init_parts: {part.path!r} from {part.folder}: {error}") from None
