"""Asking a model, be it that of a run or a published checkpoint: a prompt in, text out as it grows.

for piece in load(folder).stream("What is it?", image="cat.png"):
    print(piece, end="", flush=True)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from vl_jax import sharding
from vl_jax.checkpoint import CHECKPOINTS
from vl_jax.data.encode import Encoder, make_encoder
from vl_jax.data.images.audio import AudioConfig, SoundImage
from vl_jax.data.picture import Orientation
from vl_jax.data.sample import IMAGE_PLACEHOLDER, FileImage, Sample, Turn
from vl_jax.data.sources.llava import LlavaConfig
from vl_jax.data.sources.meta import MetaConfig
from vl_jax.data.sources.records import RecordsConfig
from vl_jax.data.text.pieces import pieces
from vl_jax.experiment import Experiment, model_spec
from vl_jax.generation.choice import GenerationConfig
from vl_jax.generation.decode import Writer
from vl_jax.generation.generate import stream
from vl_jax.interop.pretrained import Pretrained, from_pretrained
from vl_jax.layout import Layout, put_batch
from vl_jax.runs import restore
from vl_jax.train.step import TrainState


@runtime_checkable
class Asked(Protocol):
    """A model that can be asked."""

    @property
    def orientation(self) -> Orientation:
        """Which way up it sees picture files."""
        ...

    def stream(
        self, prompt: str, *, image: Path | None = None, audio: Path | None = None, max_new_tokens: int = 32
    ) -> Iterator[str]:
        """The answer to one prompt, piece by piece.

        Raises:
          ValueError: the prompt does not fit, or the model cannot see the picture or hear the sound.
        """
        ...


def load(folder: Path) -> Asked:
    """Opens the folder of a run, or that of a published checkpoint.

    Raises:
      ValueError: it is neither, or its model writes no text.
    """
    return of_run(folder) if (folder / CHECKPOINTS).is_dir() else of_published(folder)


def of_published(folder: Path) -> AskedCheckpoint:
    """Opens a published checkpoint.

    Raises:
      ValueError: see ``from_pretrained``.
    """
    return AskedCheckpoint(from_pretrained(folder))


def of_run(folder: Path) -> AskedRun:
    """Opens the newest checkpoint of a run.

    Raises:
      ValueError: the folder holds no run, or its model writes no text.
    """
    experiment, layout, state, _ = restore(folder)
    if not isinstance(layout.model, Writer):
        kind = type(experiment.model).__name__
        raise ValueError(
            f"{folder}: its model is a {kind}, which writes no text; `evaluate` says what it can"
        )
    return AskedRun(experiment, layout, state, make_encoder(experiment.data, model_spec(experiment)))


@dataclass(frozen=True)
class AskedRun:
    """The newest checkpoint of a run, asked as it was trained."""

    experiment: Experiment
    layout: Layout
    state: TrainState
    encoder: Encoder

    @property
    def orientation(self) -> Orientation:
        """As in training."""
        return self.encoder.tiling.orientation

    def stream(
        self, prompt: str, *, image: Path | None = None, audio: Path | None = None, max_new_tokens: int = 32
    ) -> Iterator[str]:
        """See ``Asked``."""
        layout, tokenizer = self.layout, self.encoder.tokenizer
        pictures: list[Any] = []
        if image:
            pictures.append(FileImage(image, where="--image", orientation=self.orientation))
        pictures += [SoundImage(audio, "--audio", hearing(self.experiment))] if audio else []
        question = f"{IMAGE_PLACEHOLDER}\n" * len(pictures) + prompt
        if pictures and not self.encoder.spec.tile_tokens_side:
            kind = type(self.experiment.model).__name__
            raise ValueError(f"{'--image' if image else '--audio'}: the model, a {kind}, reads text alone")
        name = str(image or audio or "prompt")
        sample = Sample(id=name, turns=(Turn(question, ""),), images=tuple(pictures))
        rows = [[self.encoder.prompt(sample)]] * sharding.batch_axes(layout.mesh)
        with sharding.use_mesh(layout.mesh, layout.rules):
            tokens = stream(
                {"params": self.state.params, **self.state.collections},
                self.state.routing,
                put_batch(self.encoder.collate(rows, pad_left=True), layout),
                model=layout.model,
                config=GenerationConfig(max_new_tokens=max_new_tokens),
                stop=(tokenizer.eos,),
            )
            yield from pieces(tokens, tokenizer)


@dataclass(frozen=True)
class AskedCheckpoint:
    """A published checkpoint, asked through its processor."""

    model: Pretrained

    @property
    def orientation(self) -> Orientation:
        """As the published processor reads them."""
        return getattr(self.model.processor, "orientation", "shown")

    def stream(
        self, prompt: str, *, image: Path | None = None, audio: Path | None = None, max_new_tokens: int = 32
    ) -> Iterator[str]:
        """See ``Asked``; no published checkpoint hears."""
        if audio is not None:
            raise ValueError("--audio is for the folder of a run, which says how its model hears")
        message = {"role": "user", "content": (f"{IMAGE_PLACEHOLDER}\n" if image else "") + prompt}
        yield from self.model.stream([message], [image] if image else [], max_new_tokens=max_new_tokens)


def hearing(experiment: Experiment) -> AudioConfig:
    """How the sounds of the experiment's sources become pictures."""
    for source in experiment.data.sources:
        if isinstance(source, LlavaConfig | MetaConfig | RecordsConfig):
            return source.audio
    raise ValueError("--audio: no source of the run says how a sound becomes a picture")
