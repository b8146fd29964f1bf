"""Joint models: towers see a row's inputs, a fusion brings them together, heads say what comes of it.

    Batch.tiles  --tower "image"--> Stream --.
    Batch.tokens --tower "text"---> Stream --+-- fusion --> Streams --head--> prediction of the head
    Batch.media  --tower ...------> Stream --'

A row is one sample. Its text is read as it is written, without a dialogue around it.
"""

from __future__ import annotations

import dataclasses
import keyword
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float

from vl_jax.batch import TILES, TOKENS, Batch, Given, blank
from vl_jax.data.config import DataConfig, ModelSpec, check_packing
from vl_jax.data.sources.in_domain import DOMAIN
from vl_jax.encoders.transformer import Through
from vl_jax.fusion.between_layers import in_step, mean_weights
from vl_jax.fusion.budget import BudgetConfig, GateOutput
from vl_jax.fusion.build import AnyFusion, Apart
from vl_jax.fusion.gated_streams import GatedStreams
from vl_jax.fusion.reading import (
    Tower,
    content_of_rows,
    flat,
    given_to,
    has_room,
    media_input,
    nothing_seen,
    stream_of,
    token_mask,
    told,
)
from vl_jax.fusion.streams import Stream, here
from vl_jax.fusion.towers import only_infers, read_open_rows
from vl_jax.fusion.weights import ModalityWeights
from vl_jax.heads.build import AnyHead
from vl_jax.moe.layer import MoEOutput
from vl_jax.moe.routing import State
from vl_jax.moe.specialise.domains import DomainsConfig, with_domains
from vl_jax.moe.specialise.replay import guided
from vl_jax.moe.stacks import RoutingState, Stack

_NO_TEXT = 1 << 30  # entries of a vocabulary that nothing reads
_RESERVED = ("config", "dtype", "fusion", "parent", "name", "scope")


@dataclasses.dataclass(frozen=True)
class JointConfig:
    """Towers, how they meet, and the heads."""

    towers: tuple[Tower, ...]
    heads: tuple[AnyHead, ...]
    fusion: AnyFusion = Apart()
    domains: DomainsConfig | None = None  # which experts of the towers are for which field of application
    tasks: tuple[tuple[str, str], ...] = ()  # (name, head that does it): what ``predict`` may be asked for
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; parameters stay float32
    remat: bool = False  # keep only the inputs of blocks for the backward pass

    def __post_init__(self):
        towers = tuple(tower.name for tower in self.towers)
        names = (*towers, *(field.name for field in self._labels))
        if not self.towers or not self.heads:
            raise ValueError(
                f"{len(self.towers)} towers, {len(self.heads)} heads: expected at least one each"
            )
        for name in names:
            usable = name.isidentifier() and not keyword.iskeyword(name) and name not in _RESERVED
            if not usable or names.count(name) > 1:
                raise ValueError(
                    f"name {name!r} of a tower or head: expected a word that no other has, and none of "
                    f"{', '.join(_RESERVED)}"
                )
        if sum(tower.input == TOKENS for tower in self.towers) > 1:
            raise ValueError("two towers read tokens; a row has one text, so one tower can read it")
        if self.domains is not None:
            self.domains.check(self.stacks)
        streams = self.fusion.streams(towers)
        _ = self.left_out  # it says what cannot be
        if self.in_step:
            self.fusion.check_encoders({t.name: t.encoder for t in self.towers})  # pyright: ignore
        for head in self.heads:
            for name in head.inputs:
                if name not in streams:
                    known = ", ".join(streams)
                    raise ValueError(
                        f"head {head.name!r} reads {name!r}, which is no stream; there are: {known}"
                    )
            # What another fusion makes of the towers is known when the head sees it.
            if isinstance(self.fusion, Apart) and hasattr(head, "check_widths"):
                head.check_widths({tower.name: _pooled_dim(tower.encoder) for tower in self.towers})  # pyright: ignore[reportAttributeAccessIssue]
        self._check_tasks()

    def _check_tasks(self) -> None:
        names, heads = [task for task, _ in self.tasks], [head.name for head in self.heads]
        for task, head in self.tasks:
            if not task or names.count(task) > 1:
                raise ValueError(f"task {task!r}: expected a name that no other task has")
            if head not in heads:
                raise ValueError(f"task {task!r} is for head {head!r}; the model has {', '.join(heads)}")

    @property
    def stacks(self) -> dict[str, Stack]:
        """The sparse layers of the towers that have any."""
        found = {tower.name: tower.encoder.stack for tower in self.towers}
        return {
            name: dataclasses.replace(stack, runs=tuple((name, *run) for run in stack.runs))
            for name, stack in found.items()
            if stack is not None
        }

    @property
    def budget(self) -> BudgetConfig | None:
        """Of the fusion's gate, if it has one."""
        return getattr(self.fusion, "budget", None)

    @property
    def in_step(self) -> bool:
        """Whether the fusion acts on the towers after each of their layers, and not on what they give."""
        return getattr(self.fusion, "placement", "") == "between_layers"

    @property
    def draws(self) -> tuple[str, ...]:
        """The random streams that fusion and heads need in training."""
        heads = (head.rng for head in self.heads if hasattr(head, "rng"))  # pyright: ignore[reportAttributeAccessIssue]
        return *getattr(self.fusion, "draws", ()), *dict.fromkeys(heads)

    @property
    def left_out(self) -> Tower | None:
        """The tower that, at inference, does not run for rows that do not look at it.

        Raises:
          ValueError: the budget says that there is one, and there cannot be.
        """
        if not isinstance(self.fusion, GatedStreams) or self.fusion.budget is None:
            return None
        tower = next(tower for tower in self.towers if tower.name == self.fusion.source)
        readers, against = [head.name for head in self.heads if tower.name in head.inputs], ""
        if tower.encoder.stack is not None:
            against = f"tower {tower.name!r} has experts, and what they say of a batch is of all rows"
        if readers:
            against = f"head {readers[0]!r} reads tower {tower.name!r} itself"
        return tower if self.fusion.budget.leaves_out_tower(against=against) else None

    @property
    def may_lack(self) -> frozenset[str]:
        """Inputs that a whole batch may lack: then it has a program of its own, without their towers.

        Fusion and heads then find streams without tokens, and say by ``reads_empty`` that they can.
        """
        if not getattr(self.fusion, "reads_empty", False):
            return frozenset()
        unable = [head for head in self.heads if not getattr(head, "reads_empty", False)]
        full = {name for head in unable for name in head.inputs}
        if full - {tower.name for tower in self.towers}:
            return frozenset()  # what a fusion makes of several
        return frozenset(t.input for t in self.towers) - {t.input for t in self.towers if t.name in full}

    def spec(self) -> ModelSpec:
        """What the data side must know."""
        media = dict.fromkeys(media_input(tower) for tower in self.towers if self._is_media(tower))
        text = self._reading(TOKENS)
        return ModelSpec(
            tile_tokens_side=self._tile_tokens_side,
            fusion="gated",
            vocab_size=_NO_TEXT if text is None else text.encoder.vocab_size,  # pyright: ignore
            reads="text",
            labels=self._labels,
            media=tuple(media),
            wordless=TOKENS in self.may_lack,
        )

    @property
    def _labels(self) -> tuple[Any, ...]:
        """What rows are told: what each head is to say, and their domain."""
        return self.heads if self.domains is None else (*self.heads, self.domains)

    @property
    def _tile_tokens_side(self) -> int:
        image = self._reading(TILES)
        return 1 if image is None else image.encoder.grid

    def _reading(self, kind: str) -> Tower | None:
        """The first tower that reads an input."""
        return next((tower for tower in self.towers if tower.input == kind), None)

    @staticmethod
    def _is_media(tower: Tower) -> bool:
        return tower.input not in (TILES, TOKENS)

    def head(self, name: str) -> Any:
        """The config of a head.

        Raises:
          ValueError: there is none of that name.
        """
        found = {head.name: head for head in self.heads}
        if name not in found:
            raise ValueError(f"head {name!r}: the model has {', '.join(found)}")
        return found[name]

    def head_for(self, task: str) -> str:
        """The name of the head that does a task.

        Raises:
          ValueError: there is none.
        """
        found = dict(self.tasks)
        if task not in found:
            raise ValueError(f"task {task!r}: the model does {', '.join(found) or 'none by name'}")
        return found[task]

    def trunk_of(self, head: str) -> tuple[str, ...]:
        """The modules that a head stands on: towers and fusion, as far as they act on what it reads."""
        inputs, towers = self.head(head).inputs, tuple(tower.name for tower in self.towers)
        if isinstance(self.fusion, Apart):
            return tuple(name for name in towers if name in inputs)
        return *towers, "fusion"

    def only(self, heads: Sequence[str]) -> JointConfig:
        """The same model with some of its heads alone, and of its towers those that these stand on.

        Raises:
          ValueError: there is no such head.
        """
        kept = tuple(self.head(name) for name in heads)
        trunk = {module for name in heads for module in self.trunk_of(name)}
        towers = tuple(tower for tower in self.towers if tower.name in trunk)
        domains = self.domains if any(tower.encoder.stack for tower in towers) else None
        tasks = tuple((task, head) for task, head in self.tasks if head in heads)
        return dataclasses.replace(self, towers=towers, heads=kept, domains=domains, tasks=tasks)

    def check_data(self, data: DataConfig) -> None:
        """Refuses data of another size than the towers read.

        Raises:
          ValueError: names both sides.
        """
        for tower in self.towers:
            side, length = data.tiling.tile_size, data.max_tokens
            where = f"model.towers.{tower.name}.encoder"
            if tower.input == TILES and tower.encoder.input_shape[:2] != (side, side):
                shape = "x".join(map(str, tower.encoder.input_shape[:2]))
                raise ValueError(f"data.tiling.tile_size={side} differs from the {shape} pixels of {where}")
            if tower.input != TOKENS:
                continue
            most = tower.encoder.input_shape[0]
            if length > most:
                raise ValueError(f"data.max_tokens={length} is more than the {most} of {where}")
            if getattr(tower.encoder, "sees_padding", False) and length != most:
                raise ValueError(
                    f"data.max_tokens={length} differs from the {most} of {where}, which sees padding too"
                )
        for head in self.heads:
            if hasattr(head, "check_tile"):
                head.check_tile(data.tiling.tile_size)  # pyright: ignore[reportAttributeAccessIssue]
        check_packing(data, self.spec())

    def build(self) -> Joint:
        """The module."""
        return Joint(self)

    def smallest_batch(self, rows: int) -> Batch:
        """A batch of one tile and one token a row: enough to learn the shapes of the parameters."""
        image = self._reading(TILES)
        height, width, channels = (1, 1, 3) if image is None else image.encoder.input_shape  # pyright: ignore[reportAssignmentType]
        sizes = {"T": 1, "Q": 1, "S": 1, "M": 1, "h": height, "w": width, "c": channels}

        def absent(field: Any) -> Given:
            steps = np.zeros(rows, np.int32) if getattr(field, "varies", False) else None
            return Given(np.zeros((rows, *field.shape), field.dtype), np.zeros(rows, bool), steps)

        batch = blank(sizes, rows)
        return dataclasses.replace(
            batch,
            media={field.name: absent(field) for field in self.spec().media},
            labels={field.name: absent(field) for field in self._labels},
        )


@struct.dataclass
class JointOutput:
    """What the towers saw, what the heads say, and what the sparse layers returned."""

    streams: dict[str, Stream]
    predictions: dict[str, Any]  # by head
    routed: dict[str, MoEOutput]  # by tower, over its sparse layers
    gates: GateOutput | None = None  # of a fusion whose gate has a budget
    weights: ModalityWeights | None = None  # of a fusion that weighs modalities


class Joint(nn.Module):
    """The model."""

    config: JointConfig

    def setup(self):
        c = self.config
        for tower in c.towers:
            setattr(self, tower.name, tower.encoder.build(jnp.dtype(c.dtype), remat=c.remat))
        self.fusion = c.fusion.build()
        for head in c.heads:
            setattr(self, head.name, head.build())

    def __call__(self, batch: Batch, routing_state: RoutingState) -> JointOutput:
        """Runs every tower once, and every head."""
        batch = jax.tree.map(jnp.asarray, batch)  # a host batch will do
        between = self.config.in_step
        if between and not self.is_initializing():
            streams, routed, read = self._see_in_step(batch), {}, jnp.float32(batch.tokens.shape[0])
        else:
            streams, routed, read = self._see_apart(batch, guided(routing_state, batch))
        if any(map(self.has_rng, getattr(self.config.fusion, "draws", ()))):
            content = content_of_rows(batch, self.config.towers)
            streams = {n: dataclasses.replace(s, content=content) for n, s in streams.items()}
        if not between:
            streams = self.fusion(streams)
        elif self.is_initializing():
            self.fusion.touch({tower.name: tower.encoder for tower in self.config.towers})
        predictions = {
            head.name: getattr(self, head.name)(streams, *told(batch, head.name))
            for head in self.config.heads
        }
        gates = next((s.gates for s in streams.values() if s.gates is not None), None)
        gates = None if gates is None else dataclasses.replace(gates, tower=read)
        weights = next((s.weights for s in streams.values() if s.weights is not None), None)
        return JointOutput(streams, predictions, routed, gates, weights)

    def _see_apart(
        self, batch: Batch, routing_state: RoutingState
    ) -> tuple[dict[str, Stream], dict[str, MoEOutput], jax.Array]:
        """What every tower sees by itself, what sparse layers returned, and how many rows were read."""
        streams, routed, rows = {}, {}, batch.tokens.shape[0]
        # A tower that may be left out comes last: what is said about it has to be read first.
        late, read = self.config.left_out if only_infers(self) else None, jnp.float32(rows)
        for tower in sorted(self.config.towers, key=lambda tower: tower == late):
            if not has_room(batch, tower):
                streams[tower.name] = nothing_seen(tower.encoder, rows, jnp.dtype(self.config.dtype))
                continue
            given = given_to(batch, tower)
            if tower == late:
                streams[tower.name], read = self._see_open_rows(given, streams)
                continue
            streams[tower.name], found = self.see(given, tower, self._routing(tower, batch, routing_state))
            if found is not None:
                routed[tower.name] = found
        return {tower.name: streams[tower.name] for tower in self.config.towers}, routed, read

    def _see_in_step(self, batch: Batch) -> dict[str, Stream]:
        """What the towers see, where they act on one another after every layer."""
        towers, rows = self.config.towers, batch.tokens.shape[0]
        given = {t.name: flat(given_to(batch, t), t) for t in towers if has_room(batch, t)}
        gates: list[dict[str, jax.Array]] = []

        def tower_of(name: str) -> Callable[[Through], Any]:
            return lambda through: getattr(self, name)(*given[name], {}, through=through)

        def interact(number: int, tokens: dict[str, jax.Array]) -> dict[str, jax.Array]:
            masks = {n: token_mask(given[n][1], x).reshape(rows, -1) for n, x in tokens.items()}
            trunks = {n: (x.reshape(*masks[n].shape, -1), masks[n]) for n, x in tokens.items()}
            after, gate = self.fusion(number, trunks)
            gates.append(gate)
            return {name: after[name].reshape(x.shape) for name, x in tokens.items()}

        layers = towers[0].encoder.num_layers  # pyright: ignore[reportAttributeAccessIssue]
        encoded = in_step({name: tower_of(name) for name in given}, layers, interact)
        streams = {n: stream_of(found, given[n][1], rows) for n, found in encoded.items()}
        weights = mean_weights(gates, {n: here(stream) for n, stream in streams.items()}) if streams else None
        dtype = jnp.dtype(self.config.dtype)
        streams |= {t.name: nothing_seen(t.encoder, rows, dtype) for t in towers if t.name not in given}
        return {t.name: dataclasses.replace(streams[t.name], weights=weights) for t in towers}

    def see(
        self, given: tuple[jax.Array, jax.Array], tower: Tower, routing_state: State
    ) -> tuple[Stream, MoEOutput | None]:
        """What a tower sees of some rows, and what its sparse layers returned.

        Args:
          given: what it reads, and which of it is there, rows first; tiles of all rows then stand one behind
            the other.
        """
        (inputs, valid), rows = flat(given, tower), given[0].shape[0]
        encoded = getattr(self, tower.name)(inputs, valid, routing_state)
        return stream_of(encoded, valid, rows), encoded.routed

    def _routing(self, tower: Tower, batch: Batch, routing_state: RoutingState) -> State:
        """The routing state of a tower, with what follows from the domains of the rows."""
        state, stack = routing_state.get(tower.name, {}), self.config.stacks.get(tower.name)
        if self.config.domains is None or stack is None:
            return state
        groups = batch.tokens.shape[0] * (batch.tiles.shape[1] if tower.input == TILES else 1)
        return with_domains(state, batch.labels.get(DOMAIN), self.config.domains, stack, groups=groups)

    def see_left_out(self, given: tuple[jax.Array, jax.Array]) -> Stream:
        """What the tower that may be left out sees of some rows."""
        assert self.config.left_out is not None
        return self.see(given, self.config.left_out, {})[0]

    def _see_open_rows(
        self, given: tuple[jax.Array, jax.Array], before: dict[str, Stream]
    ) -> tuple[Stream, jax.Array]:
        """What it sees of rows that look at it, 0 for the others; and the number of rows it was run for."""
        tower, budget, valid = self.config.left_out, self.config.budget, given[1]
        assert tower is not None and budget is not None
        valid = valid.reshape(valid.shape[0], -1)
        is_open = (self.fusion.looks(before) >= 0) & jnp.any(valid, axis=1)
        stream, read = read_open_rows(
            self, "see_left_out", is_open, given, parts=(tower.name,), buckets=budget.buckets
        )
        # Rows that do not look could.
        mask = jnp.repeat(valid, stream.mask.shape[1] // valid.shape[1], axis=1)
        return dataclasses.replace(stream, mask=mask), read

    def hear(
        self, chunk: Float[Array, "B l ..."], state: Any, valid: Bool[Array, "B l"], *, tower: str
    ) -> tuple[dict[str, Any], Any]:
        """What the heads that read one tower alone say after a chunk, and its state for the next.

        Args:
          state: of the tower's encoder, which streams (see ``encoders/streaming.py``).
          valid: steps of the chunk that are there.
        """
        encoded, state = getattr(self, tower).stream(chunk, state, valid)
        streams = {tower: Stream(encoded.tokens, encoded.mask, encoded.pooled)}
        heads = [head for head in self.config.heads if head.inputs == (tower,)]
        return {head.name: getattr(self, head.name)(streams) for head in heads}, state

    def initialize(self, batch: Batch, routing_state: RoutingState) -> dict[str, Any]:
        """Touches every parameter once; the method to call ``init`` with."""
        return self(batch, routing_state).predictions


def _pooled_dim(encoder: Any) -> int:
    """Width of an input as one vector: the encoder's own, or the mean of its tokens (``streams.pool``)."""
    return getattr(encoder, "pooled_dim", encoder.output_dim)
