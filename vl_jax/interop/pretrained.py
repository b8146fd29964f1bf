"""Published checkpoints: read onto a mesh, asked, and written back.

    folder --read_published--> config, rules --load_params--> parameters and routing state, where they live
    folder --from_pretrained--> a model to ask            parameters --write_published--> folder

What a checkpoint holds beyond our parameters (heads that are never run, buffers) is kept aside and written
back.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from vl_jax import params as params_lib
from vl_jax import sharding
from vl_jax.batch import Batch
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.published.request import Request
from vl_jax.data.published.stops import Stops
from vl_jax.data.text.pieces import pieces, whole
from vl_jax.generation.choice import GenerationConfig
from vl_jax.generation.decode import pad_prompts
from vl_jax.generation.generate import answer_ids, generate, stream
from vl_jax.interop import quantized, rules, surplus
from vl_jax.interop.families import FAMILIES, AnyProcessor, Family, PublishedConfig
from vl_jax.interop.folder import CONFIG, INDEX, Weights, open_weights, read_config, write_folder
from vl_jax.interop.rules import Rule
from vl_jax.interop.safetensors import Entry
from vl_jax.layout import Layout, plan_layout, put_batch
from vl_jax.model import LANGUAGE, VisionLanguage, VisionLanguageConfig
from vl_jax.moe import stacks
from vl_jax.moe.stacks import RoutingState
from vl_jax.sharding import MeshConfig, make_mesh

logger = logging.getLogger(__name__)

ROUTING = "routing"  # where the routing state stands in a tree of parameters and state
# Prompts are padded to a multiple of so many tokens, so that lengths that differ a little share a program.
PROMPT_BUCKET = 128
# Files of a published folder that are not weights; they go where the weights go.
SIDE_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.md", "LICENSE*")


@dataclass(frozen=True)
class Published:
    """A checkpoint's folder, opened: nothing of the weights is read yet."""

    folder: Path
    fields: Mapping[str, Any]  # its config.json
    config: PublishedConfig
    rules: tuple[Rule, ...]
    weights: Weights  # plain numbers: what is quantised in the folder is computed when it is used
    ignored: tuple[str, ...] = surplus.IGNORED  # regular expressions of tensors that may go unused
    copies: Mapping[str, str] = field(default_factory=dict)  # tensors that repeat another one: a tied head
    absent: Mapping[str, Entry] = field(default_factory=dict)  # tensors that a conversion has as parameters

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
      ValueError: the model type is not known, an option is not supported, files are missing or damaged, or
        the weights are quantised in a format that is not read.
    """
    folder = Path(folder)
    fields = read_config(folder)
    is_known = str(fields.get("model_type")) in FAMILIES
    return describe(folder, fields, open_weights(folder) if is_known else None)


def describe(
    folder: Path,
    fields: Mapping[str, Any],
    weights: Weights | None,
    *,
    absent: Mapping[str, Entry] | None = None,
    tied: bool | None = None,
) -> Published:
    """The checkpoint of a config and its weights.

    Args:
      absent: tensors that the checkpoint has and the weights here have not.
      tied: whether the head, where it is stored too, is the embedding table; None: if they are equal.

    Raises:
      ValueError: see ``read_published``.
    """
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES or weights is None:
        raise ValueError(f"{folder}: model_type={kind!r}: known are {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[kind]
    try:
        config = family.config(fields)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None
    weights = quantized.as_numbers(folder, fields, weights)
    absent = absent or {}
    keys = weights.entries.keys() | absent.keys()
    table, copies, layers = family.rules(config, fields, sorted(keys)), {}, 0
    if isinstance(config, VisionLanguageConfig):
        layers = config.language.num_layers
        stored = surplus.find_tied(table, keys) if config.language.tie_embeddings else None
        if stored is not None:
            tied = surplus.equal(weights, *stored) if tied is None else tied
            copies = dict([stored]) if tied else {}
        if stored is not None and not tied:
            logger.warning(
                "%s: tie_word_embeddings is true, but %s differs from %s: the head is read as stored; if "
                "that is right, set tie_word_embeddings to false",
                folder / CONFIG,
                *stored,
            )
            language = dataclasses.replace(config.language, tie_embeddings=False)
            config = dataclasses.replace(config, language=language)
        elif config.language.tie_embeddings:
            table = surplus.from_head(table, keys)
    ignored = surplus.passed_over(fields, layers, table, keys)
    ignored += [*family.ignored, *(re.escape(key) for key in copies)]
    return Published(folder, fields, config, table, weights, tuple(ignored), copies, absent)


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
    tree = rules.read(published.plan(targets), published.weights, targets, ignored=published.ignored)
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
    unchanged: Weights | None = None,
) -> None:
    """Writes parameters in the layout, names and dtypes of the checkpoint they came from.

    What was quantised is written as plain numbers, bfloat16, and the config says so.

    Args:
      folder: must not exist; it appears when it is complete.
      params, state: arrays, lazy ones too, the state by stack; one tensor is in memory at a time.
      unchanged: of a conversion, the tensors that are written as they are; the parameters give no others than
        the ``absent`` ones.

    Raises:
      WeightsError: the folder exists, or the parameters are not those of the checkpoint's model.
    """
    tree, weights = with_state(params, state.get(LANGUAGE, {})), published.weights
    plan, fields = published.plan(tree), published.fields
    known = {**weights.entries, **published.absent}
    dtypes = {key: entry.dtype for key, entry in known.items()}
    if unchanged is None:
        dtypes |= dict.fromkeys(weights.made, np.dtype(jnp.bfloat16))
        fields = quantized.without_quantization(fields) if weights.made else fields
    ours = rules.layout(plan, tree, dtypes=dtypes)
    if unchanged is None:
        others = {
            key: entry for key, entry in known.items() if key not in ours and key not in published.copies
        }
        kept = Weights(others, weights.files)
    else:
        kept = unchanged
        ours = {key: entry for key, entry in ours.items() if key in published.absent}
    copies = {key: of for key, of in published.copies.items() if key not in kept.entries}
    again = {key: Entry(known[key].shape, dtypes[key]) for key in copies}
    arrays = itertools.chain(
        ((key, array) for key, array in rules.export(plan, tree, dtypes=dtypes) if key in ours),
        ((key, kept[key]) for key in kept.entries),
        _repeated(copies, plan, tree, dtypes),
    )
    write_folder(
        folder, fields, {**ours, **kept.entries, **again}, arrays, copies=side_files(published.folder)
    )


def _repeated(
    copies: Mapping[str, str], plan: rules.Plan, tree: Any, dtypes: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors that are those of other names."""
    flat = params_lib.flatten(tree)
    for copy, key in copies.items():
        leaf = next(leaf for leaf in plan.leaves if any(key == source for _, source in leaf.sources()))
        only = params_lib.unflatten({leaf.path: flat[leaf.path]})
        for _, array in rules.export(rules.Plan((leaf,), ()), only, dtypes={key: dtypes[copy]}):
            yield copy, array


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

    @property
    def stops(self) -> Stops:
        """What ends an answer: all that the folder names.

        Raises:
          ValueError: the checkpoint has no processor.
        """
        processor = self._processor()
        tokens = dict.fromkeys((processor.tokenizer.eos, *processor.stops.tokens))
        return Stops(tuple(tokens), processor.stops.strings)

    def generate(
        self,
        conversation: Sequence[Mapping[str, Any]],
        images: Sequence[Any] | None = None,
        *,
        key: jax.Array | None = None,
        stop_strings: Sequence[str] = (),
        **options: Any,
    ) -> str:
        """The answer to a conversation.

        Args:
          conversation: messages ``{"role", "content", "images"}``; ``<image>`` marks where an image stands.
          images: files or pictures, if the messages do not name them.
          key: randomness, for a temperature above 0.
          stop_strings: end the answer as well, and are no part of it.
          options: of ``GenerationConfig``.

        Raises:
          ValueError: the conversation is malformed or too long, or the checkpoint has no processor.
        """
        prompt = self._prompt(conversation, images)
        return self._said(prompt, GenerationConfig(**options), key, stop_strings)[0]

    def prompts(self, requests: Sequence[Request], *, rows: int) -> Batch:
        """Conversations to answer, as a host batch of so many rows; those past the requests repeat the last.

        Raises:
          ValueError: a conversation is malformed or too long, or the checkpoint has no processor.
        """
        batch, more = self._processor().prompts(requests), rows - len(requests)
        return jax.tree.map(lambda a: np.concatenate([a, a[-1:].repeat(more, axis=0)]), batch)

    def answers(
        self,
        prompts: Batch,
        *,
        key: jax.Array | None = None,
        stop_strings: Sequence[str] = (),
        **options: Any,
    ) -> list[str]:
        """What is said to every row of a host batch, greedily unless the options say otherwise.

        Args:
          prompts: rows that divide by the batch shards of the mesh, see ``prompts``.
          key, stop_strings, options: as for ``generate``.
        """
        return self._said(self._put(prompts), GenerationConfig(**options), key, stop_strings)

    def _said(
        self, prompts: Batch, config: GenerationConfig, key: jax.Array | None, stop_strings: Sequence[str]
    ) -> list[str]:
        processor, stops = self._processor(), self.stops
        with sharding.use_mesh(self.layout.mesh, self.layout.rules):
            tokens = generate(
                self.params,
                self.routing_state,
                prompts,
                key,
                model=self.model,
                config=config,
                stop=stops.tokens,
            )
        tokens = multihost_utils.process_allgather(tokens, tiled=True)
        ends = (*stops.strings, *stop_strings)
        return [whole(ids, processor.tokenizer, ends) for ids in answer_ids(tokens, stop=stops.tokens)]

    def stream(
        self,
        conversation: Sequence[Mapping[str, Any]],
        images: Sequence[Any] | None = None,
        *,
        key: jax.Array | None = None,
        stop_strings: Sequence[str] = (),
        **options: Any,
    ) -> Iterator[str]:
        """``generate``, piece by piece: the text as it grows."""
        config, processor, stops = GenerationConfig(**options), self._processor(), self.stops
        with sharding.use_mesh(self.layout.mesh, self.layout.rules):
            tokens = stream(
                self.params,
                self.routing_state,
                self._prompt(conversation, images),
                key,
                model=self.model,
                config=config,
                stop=stops.tokens,
            )
            yield from pieces(tokens, processor.tokenizer, (*stops.strings, *stop_strings))

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
        return self._put(jax.tree.map(lambda a: a.repeat(rows, axis=0), batch))

    def _put(self, batch: Batch) -> Batch:
        """A host batch with more padding before its prompts, on the devices."""
        length = -(-batch.tokens.shape[1] // PROMPT_BUCKET) * PROMPT_BUCKET
        return put_batch(jax.device_get(pad_prompts(batch, length)), self.layout)


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
        does = "is not asked by itself" if hasattr(published.config, "opening") else "writes no text"
        raise ValueError(
            f"{folder}: its model is a {kind}, which {does}; `evaluate` says what it can, and `train` takes "
            "it as config.init"
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
