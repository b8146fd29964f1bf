"""VLMEvalKit: a model of its list. The kit has no entry points; ``run_vlmevalkit.py`` starts it with one.

    message [{"type": "image", "value": file}, {"type": "text", "value": "What is it?"}]  -->  answer

The kit asks one question after another. This file is imported where the kit is installed, and jax only when a
model is opened.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from vl_jax.kits.kit import part_of
from vl_jax.kits.question import KitQuestion, Part, choice, parts, question
from vl_jax.runtime import errors
from vl_jax.runtime.errors import UserError

KIT = "VLMEvalKit"
_Base: Any = part_of(KIT, "vlmeval.vlm.base").BaseModel


class VLMEvalModel(_Base):
    """A run or a published checkpoint.

    Args:
      workdir: folder of a run.
      model: folder of a published checkpoint.
      max_new_tokens: of an answer.
      dtype: of a published checkpoint.
      seed: of answers that are drawn.
      unanswerable: ``stop``: a question that cannot be asked ends the evaluation. ``empty``: its answer is
        empty, which is wrong.
      generation: how answers are chosen otherwise: ``temperature``, ``top_k``, ``top_p``, ``num_beams``,
        ``length_penalty``, ``repetition_penalty``, ``until``.
    """

    INTERLEAVE = True
    allowed_types = ("text", "image")

    def __init__(
        self,
        workdir: str = "",
        model: str = "",
        max_new_tokens: int = 512,
        dtype: str = "float32",
        seed: int = 0,
        unanswerable: str = "stop",
        **generation: Any,
    ):
        super().__init__()
        from vl_jax.kits.answerer import Batches, open_answerer
        from vl_jax.runtime import start

        if unanswerable not in ("stop", "empty"):
            raise UserError(f"unanswerable={unanswerable!r}: expected stop or empty")
        start.set_up()
        folders = (Path(folder) if folder else None for folder in (workdir, model))
        with errors.told():
            self._choice, unknown = choice(generation, max_new_tokens=max_new_tokens)
            if unknown:
                raise UserError(
                    f"{unknown[0]}={generation[unknown[0]]!r}: {type(self).__name__} has no such option"
                )
            answerer = open_answerer(*folders, batch_size=1, dtype=dtype)
            self._batches = Batches(answerer, seed=seed, skip=unanswerable == "empty", progress=False)

    def generate_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """The answer to texts and pictures in the order in which they stand."""
        name = dataset or "a message"
        return self._answer(lambda: question(name, [("user", _of_kit(name, message))]))

    def chat_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """The answer to a conversation, of messages ``{"role", "content"}`` with contents as above."""
        name = dataset or "a conversation"
        return self._answer(
            lambda: question(name, [(m["role"], _of_kit(name, m["content"])) for m in message])
        )

    def _answer(self, asked: Any) -> str:
        with errors.told():
            made: KitQuestion = asked()
            (found,) = self._batches.answers([made], lambda one: one, [self._choice])
        return found


def register(models: MutableMapping[str, Any], name: str, **options: Any) -> None:
    """Puts a model on the kit's list, ``vlmeval.config.supported_VLM``; it is opened when the kit asks.

    Args:
      options: of ``VLMEvalModel``.
    """
    models[name] = functools.partial(VLMEvalModel, **options)


def prepare(name: str, **options: Any) -> None:
    """``register`` on the list of the kit here, and the class beside the kit's own, for its config files."""
    register(part_of(KIT, "vlmeval.config").supported_VLM, name, **options)
    part_of(KIT, "vlmeval.vlm").VLMEvalModel = VLMEvalModel


def _of_kit(name: str, content: Any) -> list[Part]:
    return parts(name, content, text="value", image="value")
