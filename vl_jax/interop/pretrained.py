"""Published checkpoints: read onto a mesh, asked, and written back.

    folder --read_published--> config, rules --load_params--> parameters and routing state, where they live
    folder --from_pretrained--> a model to ask            parameters --write_published--> folder

What a checkpoint holds beyond our parameters (heads that are never run, buffers) is kept aside and written
back.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vl_jax import params as params_lib
from vl_jax import sharding
from vl_jax.batch import Batch
from vl_jax.data.images.pixels import as_tiling, load_image_processor
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.published.picture_text import PictureTextProcessor
from vl_jax.data.published.processor import Processor
from vl_jax.data.published.text_processor import TextProcessor
from vl_jax.generation.choice import GenerationConfig
from vl_jax.generation.decode import pad_prompts
from vl_jax.generation.generate import answer_ids, generate, stream
from vl_jax.heads.pairs import Pairs
from vl_jax.interop import rules
from vl_jax.interop.deepseek_vl2 import deepseek_vl2_rules, read_deepseek_vl2
from vl_jax.interop.folder import CONFIG, INDEX, Weights, open_weights, read_config, write_folder
from vl_jax.interop.language import FAMILIES as TEXT_FAMILIES
from vl_jax.interop.language import NAMES, Names, language_rules, read_language
from vl_jax.interop.rules import Rule
from vl_jax.interop.safetensors import Entry
from vl_jax.interop.vision import CONTRASTIVE, contrastive_rules, read_contrastive
from vl_jax.interop.vision_language import FAMILIES as VISION_LANGUAGE
from vl_jax.interop.vision_language import (
    IGNORED,
    load_processor,
    read_vision_language,
    vision_language_rules,
    vision_language_stacks,
)
from vl_jax.joint import JointConfig
from vl_jax.layout import Layout, plan_layout, put_batch
from vl_jax.model import LANGUAGE, VisionLanguage, VisionLanguageConfig
from vl_jax.moe import stacks
from vl_jax.moe.stacks import RoutingState
from vl_jax.sharding import MeshConfig, make_mesh

ROUTING = "routing"  # where the routing state stands in a tree of parameters and state
# Prompts are padded to a multiple of so many tokens, so that lengths that differ a little share a program.
PROMPT_BUCKET = 128
_CONTEXT = 2048  # tokens, of a language model whose config does not say
# Files of a published folder that are not weights; they go where the weights go.
SIDE_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.md", "LICENSE*")


Fields = Mapping[str, Any]
PublishedConfig = VisionLanguageConfig | JointConfig
AnyProcessor = Processor | PictureTextProcessor | TextProcessor


@dataclass(frozen=True)
class Family:
    """How checkpoints that share a ``model_type`` are read."""

    config: Callable[[Fields], Any]  # a ``PublishedConfig``, which the others get
    rules: Callable[[Any, Fields, Weights], tuple[Rule, ...]]
    # What a folder holds, read for the model; None where there is none.
    processor: Callable[[Path, Fields, Any], AnyProcessor | None] = lambda *_: None
    # How pictures become tiles in training; None where the folder does not say.
    tiling: Callable[[Path, Any], TilingConfig | None] = lambda *_: None
    # The layers each stack of parameters or state holds, for ``rules.plan``, where it is not all in one.
    stacks: Callable[[Any], dict[str, tuple[int, ...]]] = vision_language_stacks


def _language_config(fields: Fields) -> VisionLanguageConfig:
    language = read_language(fields)
    return VisionLanguageConfig(encoder=None, language=language.decoder, moe=language.moe)


def _language_rules(config: VisionLanguageConfig, fields: Fields, _: Weights) -> tuple[Rule, ...]:
    return language_rules(config.language, NAMES.get(fields["model_type"], Names()))


def _language_processor(folder: Path, fields: Fields, _: VisionLanguageConfig) -> TextProcessor | None:
    return TextProcessor.load(folder, max_tokens=fields.get("max_position_embeddings") or _CONTEXT)


def _deepseek_vl2_processor(folder: Path, *_: Any) -> Processor | None:
    return Processor.load(folder) if (folder / "processor_config.json").is_file() else None


def _deepseek_vl2_tiling(folder: Path, _: VisionLanguageConfig) -> TilingConfig | None:
    processor = _deepseek_vl2_processor(folder)
    return None if processor is None else processor.config.tiling(processor.views)


def _contrastive_tiling(folder: Path, config: JointConfig) -> TilingConfig | None:
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return None
    (view,), (image, _) = load_image_processor(folder).views, config.towers
    levels = {name: np.broadcast_to(getattr(image.encoder, f"pixel_{name}"), 3) for name in ("mean", "std")}
    for name, ours in levels.items():
        if not np.array_equal(getattr(view, name), ours):
            raise ValueError(f"{file}: image_{name}={getattr(view, name)}: must be {tuple(ours.tolist())}")
    try:
        return as_tiling(view)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


FAMILIES: dict[str, Family] = {
    "deepseek_vl_v2": Family(
        read_deepseek_vl2,
        lambda config, *_: deepseek_vl2_rules(config),
        _deepseek_vl2_processor,
        _deepseek_vl2_tiling,
    ),
    **dict.fromkeys(TEXT_FAMILIES, Family(_language_config, _language_rules, _language_processor)),
    **dict.fromkeys(
        VISION_LANGUAGE,
        Family(
            read_vision_language,
            lambda _, fields, weights: vision_language_rules(fields, weights),
            load_processor,
        ),
    ),
    **dict.fromkeys(
        CONTRASTIVE,
        Family(
            read_contrastive,
            lambda _, fields, __: contrastive_rules(fields["model_type"]),
            tiling=_contrastive_tiling,
            stacks=lambda _: {},
        ),
    ),
}


@dataclass(frozen=True)
class Published:
    """A checkpoint's folder, opened: nothing of the weights is read yet."""

    folder: Path
    fields: Mapping[str, Any]  # its config.json
    config: PublishedConfig
    rules: tuple[Rule, ...]
    weights: Weights

    @property
    def family(self) -> Family:
        """How checkpoints of its kind are read."""
        return FAMILIES[self.fields["model_type"]]

    @property
    def tiling(self) -> TilingConfig | None:
        """How its pictures become tiles; None where the folder does not say.

        Raises:
          ValueError: it says what tiles cannot be, or is malformed.
        """
        return self.family.tiling(self.folder, self.config)

    def as_run_by(self, config: Any) -> Published:
        """The checkpoint, for a model that stacks its layers in another way (``scan_layers``)."""
        return dataclasses.replace(self, config=config)

    def plan(self, tree: Any) -> rules.Plan:
        """Which tensors make up which leaf of a tree of parameters and state."""
        shapes = {path: tuple(leaf.shape) for path, leaf in params_lib.flatten(tree).items()}
        return rules.plan(self.rules, shapes, self.family.stacks(self.config))


def read_published(folder: str | Path) -> Published:
    """Opens a checkpoint in the layout of the Hugging Face hub.

    Raises:
      ValueError: the model type is not known, an option is not supported, or files are missing or damaged.
    """
    folder = Path(folder)
    fields = read_config(folder)
    kind = fields.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"{folder}: model_type={kind!r}: known are {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[kind]
    try:
        config = family.config(fields)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    weights = open_weights(folder)
    return Published(folder, fields, config, family.rules(config, fields, weights), weights)


# What is no property of a published model, but of how it is run and trained here: see ``run_as``.
MOE_SETTINGS = ("balance", "limit", "execution")


def run_as(published: PublishedConfig, ours: Any) -> PublishedConfig:
    """The published model, run and trained as ours is.

    Of ours stay compute dtype and rematerialisation, of a language model ``scan_layers`` and
    ``MOE_SETTINGS``, of a joint model what tells pictures apart (``Pairs.identity``).

    Raises:
      ValueError: ours is a model of another class, or a joint model with other parts.
    """
    if isinstance(published, VisionLanguageConfig) and isinstance(ours, VisionLanguageConfig):
        return _run_vision_language(published, ours)
    if isinstance(published, JointConfig) and isinstance(ours, JointConfig):
        return _run_joint(published, ours)
    raise ValueError(
        f"config.init: a published {type(published).__name__} cannot begin a {type(ours).__name__}"
    )


def _run_joint(published: JointConfig, ours: JointConfig) -> JointConfig:
    theirs, mine = (
        {
            "towers": [(tower.name, tower.input) for tower in config.towers],
            "fusion": config.fusion,
            "heads": [(head.name, type(head).__name__) for head in config.heads],
        }
        for config in (published, ours)
    )
    for part, expected in theirs.items():
        if mine[part] != expected:
            raise ValueError(
                f"config.model.{part}: has {mine[part]}, the checkpoint of config.init {expected}"
            )
    heads = tuple(
        dataclasses.replace(head, identity=own.identity)
        if isinstance(head, Pairs) and isinstance(own, Pairs)
        else head
        for head, own in zip(published.heads, ours.heads, strict=True)
    )
    return dataclasses.replace(published, heads=heads, dtype=ours.dtype, remat=ours.remat)


def _run_vision_language(published: VisionLanguageConfig, ours: VisionLanguageConfig) -> VisionLanguageConfig:
    language = dataclasses.replace(
        published.language, remat=ours.language.remat, scan_layers=ours.language.scan_layers
    )
    settings = {name: getattr(ours.moe, name) for name in MOE_SETTINGS}
    moe = dataclasses.replace(published.moe, **settings)
    return dataclasses.replace(published, language=language, moe=moe, dtype=ours.dtype)


def load_params(published: Published | str | Path, layout: Layout) -> tuple[Any, RoutingState]:
    """Parameters in the dtypes and where the layout wants them, and the routing state.

    One leaf at a time goes from the memory-mapped files to its devices, so host memory holds a leaf at most.

    Raises:
      WeightsError: lists every tensor without a place, parameter without a tensor, and wrong shape or dtype.
    """
    if not isinstance(published, Published):
        published = read_published(published)
    published = published.as_run_by(layout.model.config)
    state = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=layout.replicated),
        jax.eval_shape(lambda: stacks.init_state(published.config.stacks)),
    )
    targets = with_state(layout.params, state.get(LANGUAGE, {}))
    tree = rules.read(published.plan(targets), published.weights, targets, ignored=IGNORED)
    found = tree.pop(ROUTING, {})
    return tree, {name: found if name == LANGUAGE else {} for name in state}


def side_files(folder: Path) -> list[Path]:
    """The files of a published folder that are neither its config nor its weights: tokenizer, licence."""
    found = {file for pattern in SIDE_FILES for file in folder.glob(pattern)}
    return sorted(found - {folder / name for name in (CONFIG, INDEX)})


def write_published(
    folder: Path,
    params: Any,
    state: Mapping[str, Mapping[str, Any]],
    published: Published,
    *,
    dtypes: Mapping[str, Any] | None = None,
) -> None:
    """Writes parameters in the layout, names and dtypes of the checkpoint they came from.

    Args:
      folder: must not exist; it appears when it is complete.
      params, state: arrays, lazy ones too, the state by stack; one tensor is in memory at a time.
      dtypes: of the tensors of a parameter or state, by its path; None: as in the checkpoint.

    Raises:
      WeightsError: the folder exists, or the parameters are not those of the checkpoint's model.
    """
    tree = with_state(params, state.get(LANGUAGE, {}))
    plan = published.plan(tree)
    entries = published.weights.entries
    by_key = {key: entry.dtype for key, entry in entries.items()}
    if dtypes is not None:
        by_key |= {key: dtypes[leaf.path] for leaf in plan.leaves for _, key in leaf.sources()}
    ours = rules.layout(plan, tree, dtypes=by_key)
    kept: dict[str, Entry] = {key: entry for key, entry in entries.items() if key not in ours}
    arrays = itertools.chain(
        rules.export(plan, tree, dtypes=by_key), ((key, published.weights[key]) for key in kept)
    )
    write_folder(folder, published.fields, {**ours, **kept}, arrays, copies=side_files(published.folder))


def with_state(params: Any, state: Any) -> dict[str, Any]:
    """One tree of parameters and the decoder's routing state, which is empty for most schemes."""
    return {**params, ROUTING: state} if state else dict(params)


@dataclass(frozen=True)
class Pretrained:
    """A model with its weights and its processor, ready to be asked."""

    layout: Layout
    params: Any
    routing_state: RoutingState
    processor: AnyProcessor | None  # None: the folder has none

    @property
    def model(self) -> VisionLanguage:
        return self.layout.model

    def generate(
        self,
        conversation: Sequence[Mapping[str, Any]],
        images: Sequence[Any] | None = None,
        *,
        key: jax.Array | None = None,
        **options: Any,
    ) -> str:
        """The answer to a conversation.

        Args:
          conversation: messages ``{"role", "content", "images"}``; ``<image>`` marks where an image stands.
          images: files or pictures, if the messages do not name them.
          key: randomness, for a temperature above 0.
          options: of ``GenerationConfig``.

        Raises:
          ValueError: the conversation is malformed or too long, or the checkpoint has no processor.
        """
        config, processor = GenerationConfig(**options), self._processor()
        stop = (processor.tokenizer.eos,)
        with sharding.use_mesh(self.layout.mesh, self.layout.rules):
            tokens = generate(
                self.params,
                self.routing_state,
                self._prompt(conversation, images),
                key,
                model=self.model,
                config=config,
                stop=stop,
            )
        return processor.tokenizer.decode(answer_ids(tokens, stop=stop)[0])

    def stream(
        self,
        conversation: Sequence[Mapping[str, Any]],
        images: Sequence[Any] | None = None,
        *,
        key: jax.Array | None = None,
        **options: Any,
    ) -> Any:
        """``generate``, piece by piece: an iterator over the text as it grows."""
        config, processor = GenerationConfig(**options), self._processor()
        with sharding.use_mesh(self.layout.mesh, self.layout.rules):
            tokens = stream(
                self.params,
                self.routing_state,
                self._prompt(conversation, images),
                key,
                model=self.model,
                config=config,
                stop=(processor.tokenizer.eos,),
            )
            yield from pieces(tokens, processor.tokenizer)

    def _processor(self) -> AnyProcessor:
        if self.processor is None:
            raise ValueError(
                "the checkpoint has no processor (processor_config.json, preprocessor_config.json, or of a "
                "language model tokenizer.json and a chat template): ask the model itself, with token ids"
            )
        return self.processor

    def _prompt(self, conversation: Sequence[Mapping[str, Any]], images: Sequence[Any] | None) -> Batch:
        messages = list(conversation)
        if messages and messages[-1]["role"].strip("<|>").lower() == "user":
            messages.append({"role": "assistant", "content": ""})
        batch = self._processor()(conversations=messages, images=images)
        rows = sharding.batch_axes(self.layout.mesh)
        batch = jax.tree.map(lambda a: a.repeat(rows, axis=0), batch)
        length = -(-batch.tokens.shape[1] // PROMPT_BUCKET) * PROMPT_BUCKET
        return put_batch(jax.device_get(pad_prompts(batch, length)), self.layout)


def pieces(tokens: Iterable[Sequence[int | None]], tokenizer: Any) -> Iterator[str]:
    """The text of the first row as it grows, from what ``stream`` gives."""
    ids, shown = [], ""
    for token, *_ in tokens:
        if token is None:
            break
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # a character of several tokens is not complete yet
            yield text[len(shown) :]
            shown = text


def from_pretrained(
    folder: str | Path, *, mesh: Mesh | None = None, dtype: str = "float32", scan_layers: bool = False
) -> Pretrained:
    """Loads a published checkpoint.

    Args:
      folder: in the layout of the Hugging Face hub, with safetensors.
      mesh: the devices to load onto; None: all of them, with parameters sharded over ``fsdp``.
      dtype: of parameters and activations, float32 or bfloat16. Rotary angles stay float32 either way.
      scan_layers: whether layers share a program, which compiles faster and decodes slower on a CPU.

    Raises:
      ValueError: see ``read_published`` and ``load_params``; or the model writes no text.
    """
    published = read_published(folder)
    if not isinstance(published.config, VisionLanguageConfig):
        kind = type(published.config).__name__
        raise ValueError(
            f"{folder}: its model is a {kind}, which writes no text; `evaluate` says what it can"
        )
    language = dataclasses.replace(published.config.language, scan_layers=scan_layers)
    config = dataclasses.replace(published.config, dtype=dtype, language=language)  # pyright: ignore[reportArgumentType]
    mesh = mesh or make_mesh(MeshConfig(data=1, fsdp=-1))
    example = config.smallest_batch(sharding.batch_axes(mesh))
    layout = plan_layout(config, example, mesh)
    stored = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=leaf.sharding), layout.params
    )
    params, state = load_params(published, dataclasses.replace(layout, params=stored))
    processor = published.family.processor(published.folder, published.fields, config)
    return Pretrained(layout, params, state, processor)
