"""lmms-eval: ``lmms-eval --model vl_jax --model_args workdir=runs/mine --tasks ...``.

The kit finds ``manifest`` by the entry point of group ``lmms_eval.models`` and takes the class for
conversations; with ``--force_simple`` it takes the other one, which tasks need that compare how likely
answers are (``output_type: multiple_choice`` or ``loglikelihood``). This file is imported by the kit alone,
and jax only when a model is opened.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vl_jax.kits.kit import part_of
from vl_jax.kits.question import Choice, KitQuestion, asked, choice, parts, picture, question
from vl_jax.runtime import errors
from vl_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from vl_jax.kits.answerer import Batches

KIT = "lmms-eval"
_Base: Any = part_of(KIT, "lmms_eval.api.model").lmms
_Result: Any = getattr(part_of(KIT, "lmms_eval.api.instance"), "GenerationResult", object)
_log = logging.getLogger(__name__)


class LikelihoodPair(tuple, _Result):
    """What ``loglikelihood`` gives for a request: a number, and whether the model would write the text.

    Version 0.7.3 makes a text of a bare pair before it scores it; what has a ``text`` it takes as it is.
    """

    def __init__(self, pair: tuple[float, bool]):
        """Nothing is left to do: ``tuple`` has taken the values."""

    @property
    def text(self) -> tuple[float, bool]:
        """The pair itself."""
        return tuple(self)  # pyright: ignore[reportReturnType]


def manifest() -> Any:
    """What the kit's list of models holds of ours."""
    made: Any = part_of(KIT, "lmms_eval.models.registry_v2").ModelManifest
    return made(
        model_id="vl_jax",
        simple_class_path=f"{__name__}.LmmsSimple",
        chat_class_path=f"{__name__}.LmmsChat",
    )


class LmmsSimple(_Base):
    """A model that gets a text, and pictures beside it.

    Args:
      workdir: folder of a run.
      model, pretrained: folder of a published checkpoint, under our name or the kit's.
      batch_size: questions at once; the kit's option ``--batch_size``.
      max_new_tokens: of an answer, where the task does not say.
      dtype: of a published checkpoint.
      seed: of answers that are drawn.
      unanswerable: ``stop``: a question that cannot be asked (too long, a broken picture) ends the
        evaluation. ``empty``: it is logged, and its answer is empty, which is wrong.
      options: of the kit: ``device`` and ``max_batch_size``, which jax and ``batch_size`` decide.
    """

    is_simple = True

    def __init__(
        self,
        workdir: str = "",
        model: str = "",
        pretrained: str = "",
        batch_size: int | str = 1,
        max_new_tokens: int = 128,
        dtype: str = "float32",
        seed: int = 0,
        unanswerable: str = "stop",
        **options: Any,
    ):
        super().__init__()
        unknown = sorted(set(options) - {"device", "max_batch_size"})
        if unknown:
            raise UserError(
                f"--model_args {unknown[0]}={options[unknown[0]]}: known are workdir, model (or pretrained), "
                "max_new_tokens, dtype, seed, unanswerable; the size of batches is the option --batch_size"
            )
        if options.get("device"):
            _log.warning("--device=%s: jax chooses the device; JAX_PLATFORMS limits it", options["device"])
        if unanswerable not in ("stop", "empty"):
            raise UserError(f"unanswerable={unanswerable!r}: expected stop or empty")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                "start one process, without accelerate or torchrun: it uses all devices there are"
            )
        if not str(batch_size).isdecimal():
            raise UserError(f"--batch_size={batch_size}: expected a number")
        self._max_new_tokens, self._unknown = int(max_new_tokens), set()
        where = str(workdir), str(model or pretrained)
        self._batches = _opened(where, int(batch_size), dtype, int(seed), skip=unanswerable == "empty")

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers, in the order of the requests."""
        with errors.told():
            choices = [self._choice(request) for request in requests]
            return self._batches.answers(requests, self._question, choices)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Of every request, how likely its continuation is, and whether the model would write it.

        For choices among answers the kit looks for the smallest number, for what its own models return is
        the mean loss of a token. For tasks of one continuation it takes a log-probability.
        """
        with errors.told():
            found = self._batches.likelihoods(requests, self._pair)
        numbers = [
            -f.total / max(f.tokens, 1) if isinstance(request.args[1], str) else f.total
            for request, f in zip(requests, found, strict=True)
        ]
        return [LikelihoodPair((n, f.greedy)) for n, f in zip(numbers, found, strict=True)]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Refuses.

        Raises:
          UserError: always.
        """
        raise UserError(
            f"task {requests[0].task_name}: asks in several rounds, which vl_jax models do not do here"
        )

    def _choice(self, request: Any) -> Choice:
        found, unknown = choice(self._generation(request), max_new_tokens=self._max_new_tokens)
        for name in set(unknown) - self._unknown:
            _log.warning("task %s: generation option %s is not known and not used", request.task_name, name)
        self._unknown |= set(unknown)
        return found

    def _generation(self, request: Any) -> dict[str, Any]:
        return request.args[1] or {}

    def _question(self, request: Any) -> KitQuestion:
        text, _, visual, *where = request.args
        return asked(self._name(request), text, self._pictures(request, visual, where))

    def _pair(self, request: Any) -> tuple[KitQuestion, str]:
        if len(request.args) < 6:
            raise UserError(
                f"task {request.task_name}: its metric acc_mutual_info asks for answers without a question, "
                "which vl_jax models do not have"
            )
        text, continuation, visual, *where = request.args
        answer = continuation if isinstance(continuation, str) else continuation(self._document(where))
        name = self._name(request)
        if not isinstance(answer, str):
            raise UserError(f"{name}: its target is {type(answer).__name__}, expected a text")
        return asked(name, text, self._pictures(request, visual, where)), answer

    def _pictures(self, request: Any, visual: Any, where: Sequence[Any]) -> list[Any]:
        found = (visual(self._document(where)) if visual is not None else None) or []
        flat = [v for one in found for v in (one if isinstance(one, list | tuple) else [one])]
        return [picture(self._name(request), value) for value in flat]

    def _document(self, where: Sequence[Any]) -> Any:
        number, task, split = where
        return self.task_dict[task][split][number]

    def _name(self, request: Any) -> str:
        return f"{request.task_name}, document {request.doc_id}"


class LmmsChat(LmmsSimple):
    """A model that gets a conversation."""

    is_simple = False

    def _generation(self, request: Any) -> dict[str, Any]:
        return request.args[2] or {}

    def _question(self, request: Any) -> KitQuestion:
        _, messages, _, *where = request.args
        name = self._name(request)
        document = self._document(where)
        said = [(m["role"], parts(name, m["content"], text="text", image="url")) for m in messages(document)]
        return question(name, said)


def _opened(where: tuple[str, str], batch_size: int, dtype: str, seed: int, *, skip: bool) -> Batches:
    from vl_jax.kits.answerer import Batches, open_answerer
    from vl_jax.runtime import start

    start.set_up()
    workdir, model = (Path(folder) if folder else None for folder in where)
    with errors.told():
        return Batches(
            open_answerer(workdir, model, batch_size=batch_size, dtype=dtype), seed=seed, skip=skip
        )
