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
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vl_jax import params as params_lib
from vl_jax.encoders.resnet import ResNetConfig
from vl_jax.encoders.vit import ViTConfig
from vl_jax.interop import conv, rules, vision
from vl_jax.interop.encoders import kinds
from vl_jax.interop.folder import open_weights, read_config
from vl_jax.interop.safetensors import WeightsError
from vl_jax.joint import JointConfig
from vl_jax.layout import Layout, Variables
from vl_jax.model import ENCODER, VisionLanguageConfig

logger = logging.getLogger(__name__)

# Fields of which a part and what is read into it must have the same.
_RESNET_SAME = ("stem_dim", "block", "bottleneck_stride", "first_stage_stride", "activation")
_VIT_SAME = ("embed_dim", "mlp_dim", "num_heads", "activation", "norm_epsilon", "qkv_bias", "pre_norm")
_ANCHOR = "embedder.embedder.convolution.weight"  # of a residual network


@dataclasses.dataclass(frozen=True)
class PublishedPart:
    """A part of a model, and the published encoder that it begins with."""

    path: str  # of its module
    config: Any  # ours
    fresh: tuple[str, ...]  # paths of parameters of it that no published model has
    folder: Path
    kind: str  # the published model type
    published: Any  # the published encoder's config as one of ours


def places(model: Any) -> dict[str, tuple[Any, tuple[str, ...]]]:
    """What published encoders can be read into, by path: the config, and what of it nobody publishes."""
    encoders: dict[str, Any] = {}
    if isinstance(model, JointConfig):
        encoders = {tower.name: tower.encoder for tower in model.towers}
    elif isinstance(model, VisionLanguageConfig):
        encoders = {ENCODER: model.encoder}
    found: dict[str, tuple[Any, tuple[str, ...]]] = {}
    for name, encoder in encoders.items():
        if isinstance(encoder, ViTConfig | ResNetConfig) or kinds.kind_of(encoder):
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
        where, folder = f"config.init_parts: {path!r}", Path(name)
        if path not in known:
            raise ValueError(f"{where} is no part of the model; there are: {', '.join(known) or 'none'}")
        if any(path == part.path for part in found):
            raise ValueError(f"{where} is named twice")
        if not folder.is_dir():
            raise ValueError(f"{where}: no folder {name}")
        kind, fields = _encoder_of(read_config(folder))
        expected = _expected(known[path][0])
        if kind not in expected:
            raise ValueError(f"{where}: {name} holds a {kind!r}, expected {' or '.join(expected)}")
        try:
            published = _published(kind, fields)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{where}: {name}: {error}") from None
        part = PublishedPart(path, *known[path], folder, kind, published)
        wrong = next(_differences(part), None)
        if wrong is not None:
            name_of, ours, theirs = wrong
            raise ValueError(f"{where} has {name_of}={ours!r}, the {kind} of {name} has {theirs!r}")
        found.append(part)
    return tuple(found)


def _encoder_of(fields: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Model type and config of the encoder of pictures, which may be one of several parts of a checkpoint."""
    kind, inner = str(fields.get("model_type")), fields.get("vision_config")
    if kind in vision.TABLES or not isinstance(inner, Mapping):
        return kind, fields
    kind = str(inner.get("model_type") or f"{kind}_vision_model")
    return kind, {**inner, "model_type": kind}


def _expected(config: Any) -> tuple[str, ...]:
    """The model types whose weights an encoder can take."""
    kind = kinds.kind_of(config)
    if kind is not None:
        return (kind,)
    return ("resnet",) if isinstance(config, ResNetConfig) else tuple(vision.TABLES)


def _published(kind: str, fields: Mapping[str, Any]) -> Any:
    """A published config as one of ours."""
    if kind in kinds.KINDS:
        return kinds.KINDS[kind].read(fields)
    return conv.read_resnet(fields) if kind == "resnet" else vision.read_vision(fields)


def _differences(part: PublishedPart) -> Iterator[tuple[str, Any, Any]]:
    """(field, ours, theirs) of what must be alike."""
    ours, theirs = part.config, part.published
    if part.kind in kinds.KINDS:
        yield from kinds.differences(ours, theirs, part.kind)
        return
    is_resnet = isinstance(ours, ResNetConfig)
    for name in _RESNET_SAME if is_resnet else _VIT_SAME:
        if getattr(ours, name) != getattr(theirs, name):
            yield name, getattr(ours, name), getattr(theirs, name)
    if is_resnet:
        for name in ("stage_dims", "stage_blocks"):
            mine, given = getattr(ours, name), getattr(theirs, name)
            if mine != given[: len(mine)]:
                yield name, mine, given
        return
    if ours.num_layers > theirs.num_layers:
        yield "num_layers", ours.num_layers, theirs.num_layers
    if ours.class_token and not theirs.class_token:
        yield "class_token", True, False


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
    positions = f"params/{part.path}/positions"
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
    if positions in own:
        source = next(rule.source for rule in table if rule.target == positions)
        if source not in weights:
            raise ValueError(f"config.init_parts: {part.path!r} from {part.folder}: {source} is missing")
        resized = _positions(np.asarray(weights[source]), part)
        found[positions] = jax.device_put(resized, own[positions].sharding)
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


def _rules(
    part: PublishedPart, keys: Mapping[str, Any]
) -> tuple[tuple[rules.Rule, ...], dict[str, tuple[int, ...]]]:
    """The rules of a part, and the layers of its stacks."""
    target = f"params/{part.path}/"
    try:
        if part.kind == "resnet":
            source = _prefix(keys, _ANCHOR)
            table = conv.resnet_rules(part.config, source, target, f"batch_stats/{part.path}/")
            return table, {}
        if part.kind in kinds.KINDS:
            kind = kinds.KINDS[part.kind]
            return kind.rules(part.config, keys, _prefix(keys, kind.anchor), target)
        source = vision.find_prefix(keys, part.kind)
    except ValueError as error:
        raise ValueError(f"config.init_parts: {part.path!r} from {part.folder}: {error}") from None
    table = vision.vision_rules(part.kind, source=source, target=target)
    blocks, stack = f"{target}blocks/", f"{target}{rules.STACK}/"
    table = tuple(dataclasses.replace(r, target=r.target.replace(blocks, stack, 1)) for r in table)
    return table, {run.name: run.layers for run in part.config.block.runs}


def _prefix(keys: Mapping[str, Any], anchor: str) -> str:
    """What comes before the names of an encoder one of whose tensors is called ``anchor``.

    Raises:
      ValueError: none or several are.
    """
    found = [key.removesuffix(anchor) for key in keys if key == anchor or key.endswith(f".{anchor}")]
    if len(found) != 1:
        raise ValueError(f"{len(found)} tensors are called {anchor!r}; expected one")
    return found[0]


def _positions(table: np.ndarray, part: PublishedPart) -> np.ndarray:
    """The first positions of a text, or those of a grid as those of another one, by bicubic interpolation.

    Returns:
      f32[T D].

    Raises:
      ValueError: the table is not that of its own config.
    """
    theirs, ours = part.published, part.config
    table = np.asarray(table, np.float32).reshape(-1, table.shape[-1])
    if part.kind in kinds.KINDS:
        return table[: ours.max_length]
    if table.shape != (theirs.length, theirs.embed_dim):
        expected = (theirs.length, theirs.embed_dim)
        raise ValueError(f"config.init_parts: positions have shape {table.shape}, expected {expected}")
    first, cells = table[: int(theirs.class_token)], table[int(theirs.class_token) :]
    if theirs.grid_shape != ours.grid_shape:
        grid = cells.reshape(*theirs.grid_shape, -1)
        resized = jax.image.resize(grid, (*ours.grid_shape, grid.shape[-1]), "bicubic", antialias=False)
        cells = np.asarray(resized).reshape(math.prod(ours.grid_shape), -1)
    return np.concatenate([first, cells]) if ours.class_token else cells
