"""Our side of a kit: a run or a published checkpoint, asked in batches.

KitQuestion --Answerer.answers--> text              what is left of a batch repeats its last question
KitQuestion, text --Answerer.likelihoods--> how likely the text is as the answer
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from vl_jax import ask, losses, sharding
from vl_jax.batch import Batch
from vl_jax.data.example import Example
from vl_jax.data.published.request import Request
from vl_jax.data.published.stops import stops_of_data
from vl_jax.data.sample import BadSample
from vl_jax.data.stream.held_out import full_batch
from vl_jax.data.text.pieces import whole
from vl_jax.generation.choice import GenerationConfig
from vl_jax.generation.decode import Writer, warn_if_not_causal
from vl_jax.generation.generate import answer_ids, generate
from vl_jax.interop.pretrained import from_pretrained
from vl_jax.kits.question import Choice, KitQuestion
from vl_jax.layout import put_batch
from vl_jax.runtime.errors import UserError

_log = logging.getLogger(__name__)

_MULTIPLE = 64  # lengths are rounded up to a multiple of it, so that there are few programs
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """How likely a text is as an answer; its end is not part of it.

    Attributes:
      total: log-probability of all its tokens, in nats.
      tokens: how many there are.
      greedy: whether each of them is the likeliest after those before it.
    """

    total: float
    tokens: int
    greedy: bool


@runtime_checkable
class Answerer(Protocol):
    """A model that is asked by a kit."""

    @property
    def rows(self) -> int:
        """How many questions are answered at once."""
        ...

    def answers(self, questions: Sequence[KitQuestion], choice: Choice, key: jax.Array | None) -> list[str]:
        """The answers to at most ``rows`` questions.

        Raises:
          ValueError: a question does not fit, or a picture of it cannot be used; the message names it.
        """
        ...

    def likelihoods(self, questions: Sequence[KitQuestion], texts: Sequence[str]) -> list[Likelihood]:
        """How likely each text is as the answer to its question.

        Raises:
          ValueError: as ``answers``, or the model cannot say.
        """
        ...


def open_answerer(workdir: Path | None, model: Path | None, *, batch_size: int, dtype: str) -> Answerer:
    """Opens a run, or a published checkpoint.

    Args:
      batch_size: questions at once, rounded up to a multiple of the devices that share a batch.
      dtype: of a published checkpoint, float32 or bfloat16; a run has its own.

    Raises:
      ValueError: the folder is neither, its model writes no text, or not exactly one folder is given.
    """
    if (workdir is None) == (model is None):
        raise UserError(
            "give workdir=FOLDER of a run, or model=FOLDER of a published checkpoint, and not both"
        )
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}: must be at least 1")
    if workdir is not None:
        asked = ask.of_run(workdir)
        return RunAnswerer(asked, _rows(asked.layout, batch_size))
    assert model is not None
    pretrained = from_pretrained(model, dtype=dtype)
    return PublishedAnswerer(pretrained, _rows(pretrained.layout, batch_size))


def _rows(layout: Any, batch_size: int) -> int:
    axes = sharding.batch_axes(layout.mesh)
    warn_if_not_causal(layout.model)
    return -(-batch_size // axes) * axes


@dataclasses.dataclass(frozen=True)
class RunAnswerer:
    """The newest checkpoint of a run, asked as it was trained."""

    asked: ask.AskedRun
    rows: int

    def answers(self, questions: Sequence[KitQuestion], choice: Choice, key: jax.Array | None) -> list[str]:
        """See ``Answerer``."""
        encoder = self.asked.encoder
        self._check(questions)
        examples = [encoder.prompt(q.sample(self.asked.orientation)) for q in questions]
        batch = full_batch(examples, encoder, rows=self.rows, length_multiple=_MULTIPLE, pad_left=True)
        layout = self.asked.layout
        with sharding.use_mesh(layout.mesh, layout.rules):
            tokens = generate(
                self._variables,
                self.asked.state.routing,
                put_batch(batch, layout),
                key,
                model=layout.model,
                config=GenerationConfig(**dict(choice.options)),
                stop=self.stops,
            )
        ids = answer_ids(jax.device_get(tokens), stop=self.stops)
        return [whole(row, encoder.tokenizer, choice.until) for row in ids[: len(questions)]]

    def likelihoods(self, questions: Sequence[KitQuestion], texts: Sequence[str]) -> list[Likelihood]:
        """See ``Answerer``."""
        self._check(questions)
        pairs = zip(questions, texts, strict=True)
        examples = [self._with_answer(question, text) for question, text in pairs]
        most = max(int(np.count_nonzero(e.loss_weights)) for e in examples)
        encoder = dataclasses.replace(
            self.asked.encoder, max_targets=-(-max(most, 1) // _MULTIPLE) * _MULTIPLE
        )
        batch = full_batch(examples, encoder, rows=self.rows, length_multiple=_MULTIPLE, pad_left=False)
        layout = self.asked.layout
        with sharding.use_mesh(layout.mesh, layout.rules):
            score = _scored(layout.model)
            nll, right = jax.device_get(
                score(self._variables, self.asked.state.routing, put_batch(batch, layout))
            )
        counted = np.asarray(batch.loss_weights) > 0
        return [
            Likelihood(-float(n[c].sum(dtype=np.float64)), int(c.sum()), bool(r[c].all()))
            for n, r, c in list(zip(nll, right, counted, strict=True))[: len(questions)]
        ]

    @functools.cached_property
    def stops(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        return stops_of_data(self.asked.experiment.data.tokenizer, self.asked.encoder.tokenizer)

    @property
    def _variables(self) -> dict[str, Any]:
        state = self.asked.state
        return {"params": state.params, **state.collections}

    def _check(self, questions: Sequence[KitQuestion]) -> None:
        if not self.asked.encoder.spec.tile_tokens_side:
            seen = next((q for q in questions if q.pictures), None)
            if seen is not None:
                kind = type(self.asked.experiment.model).__name__
                raise BadSample(
                    "no_pictures", f"{seen.name}: has a picture; the model, a {kind}, reads text alone"
                )

    def _with_answer(self, question: KitQuestion, text: str) -> Example:
        """The conversation with an answer, of which nothing else is predicted, nor its end."""
        encoder, sample = self.asked.encoder, question.sample(self.asked.orientation, answer=text)
        example = encoder.example(sample, targets="answers")
        if example.num_turns < len(sample.turns):
            raise BadSample("too_long", f"{question.name}: does not fit {encoder.max_tokens} tokens")
        run = example.answer_runs[-1]
        weights = np.zeros_like(example.loss_weights)
        weights[run.start - 1 : run.stop - 2] = 1  # a token is predicted from the one before it
        return dataclasses.replace(example, loss_weights=weights)


@dataclasses.dataclass(frozen=True)
class PublishedAnswerer:
    """A published checkpoint, asked through its processor."""

    model: Any  # Pretrained
    rows: int

    def answers(self, questions: Sequence[KitQuestion], choice: Choice, key: jax.Array | None) -> list[str]:
        """See ``Answerer``."""
        said = self.model.answers(
            self._prompts(questions), key=key, stop_strings=choice.until, **dict(choice.options)
        )
        return said[: len(questions)]

    def likelihoods(self, questions: Sequence[KitQuestion], texts: Sequence[str]) -> list[Likelihood]:
        """Refuses: a processor makes prompts, and no answers that are given.

        Raises:
          UserError: always.
        """
        raise UserError(
            "a published checkpoint is only asked to write answers here: choose a task that generates, or "
            "give workdir= of a run, which can also say how likely an answer is"
        )

    def _prompts(self, questions: Sequence[KitQuestion]) -> Batch:
        """The prompts, a row each; an error names the question."""
        try:
            return self.model.prompts([_request(q) for q in questions], rows=self.rows)
        except ValueError as error:
            if len(questions) == 1:
                raise BadSample("bad_question", f"{questions[0].name}: {error}") from None
            for question in questions:
                self._prompts([question])
            raise


def _request(question: KitQuestion) -> Request:
    """A question as what a processor is asked for."""
    said = [{"role": one.role, "content": one.text} for one in question.said]
    return Request((*said, {"role": "assistant", "content": ""}), images=list(question.pictures))


@functools.cache
def _scored(model: Writer) -> Any:
    """The loss of every target in nats [B Q], and whether it is the likeliest token [B Q]."""

    def run(variables: Any, routing: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        output: Any = model.apply(variables, batch, routing)
        predicting = jnp.take_along_axis(output.hidden, batch.target_index[..., None], axis=1)
        logits: Any = model.apply(variables, predicting, method="logits")
        return losses.cross_entropy(logits, batch.targets)[0], jnp.argmax(logits, axis=-1) == batch.targets

    return jax.jit(run)


class Batches:
    """Requests of a kit, answered in batches of one choice each; results are in the order of the requests.

    Args:
      seed: of answers that are drawn.
      skip: whether a question that cannot be asked (too long, a broken picture) is logged and answered with
        nothing, which is wrong; otherwise it ends the evaluation.
      progress: whether it is shown.
    """

    def __init__(self, answerer: Answerer, *, seed: int = 0, skip: bool = False, progress: bool = True):
        self._answerer, self._skip, self._progress = answerer, skip, progress
        self._key, self._drawn = jax.random.key(seed), 0

    def answers(
        self, requests: Sequence[T], question: Callable[[T], KitQuestion], choices: Sequence[Choice]
    ) -> list[str]:
        """The answer to every request.

        Args:
          question: of a request; it is made when its batch is, as pictures take memory.
          choices: how the answer to each is chosen.
        """
        of_choice: dict[Choice, list[int]] = {}
        for number, choice in enumerate(choices):
            of_choice.setdefault(choice, []).append(number)
        batches = [
            (c, some) for c, numbers in of_choice.items() for some in _parts(numbers, self._answerer.rows)
        ]
        found = [""] * len(requests)
        for choice, numbers in self._shown(batches):
            questions = [question(requests[number]) for number in numbers]
            for place, text in self._some(questions, choice):
                found[numbers[place]] = text
        return found

    def likelihoods(
        self, requests: Sequence[T], pair: Callable[[T], tuple[KitQuestion, str]]
    ) -> list[Likelihood]:
        """How likely the answer of every request is."""
        found: list[Likelihood] = []
        for some in self._shown(list(_parts(requests, self._answerer.rows))):
            questions, texts = zip(*map(pair, some), strict=True)
            found += self._answerer.likelihoods(questions, texts)
        return found

    def _shown(self, batches: Sequence[T]) -> Iterable[T]:
        return track(batches, "answers", console=Console(stderr=True)) if self._progress else batches

    def _some(self, questions: list[KitQuestion], choice: Choice) -> list[tuple[int, str]]:
        """The answers to one batch, each with its place in it; what cannot be asked is left out."""
        key = None
        if dict(choice.options).get("temperature"):
            key, self._drawn = jax.random.fold_in(self._key, self._drawn), self._drawn + 1
        try:
            return list(enumerate(self._answerer.answers(questions, choice, key)))
        except ValueError as error:
            if not self._skip:
                raise
            if len(questions) == 1:
                _log.warning("answered with nothing: %s", error)
                return []
        alone = [(place, self._some([one], choice)) for place, one in enumerate(questions)]
        return [(place, text) for place, found in alone for _, text in found]


def _parts(values: Sequence[T], size: int) -> list[Sequence[T]]:
    return [values[begin : begin + size] for begin in range(0, len(values), size)]
