"""Asking: prompts to a model in batches that never depend on what was asked before a stop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.progress import track

from vl_jax.data.encode import make_encoder
from vl_jax.data.example import Example
from vl_jax.data.sample import BadSample, Sample
from vl_jax.data.stream.held_out import full_batch
from vl_jax.evaluate.exams.predictions import PredictionFile
from vl_jax.evaluate.task import Examinee
from vl_jax.evaluate.tasks.answers import generated

logger = logging.getLogger(__name__)

# What is said to every sample, or why it could not be asked.
Respond = Callable[[Sequence[Sample], int], list[str | BadSample]]
_LENGTH_MULTIPLE = 64  # tokens: prompts that differ a little in length share a program


def respond_with(examinee: Examinee) -> Respond:
    """How an examinee answers: by its own ``respond``, or else through the encoder of its data config.

    Raises:
      ValueError: the tokenizer cannot be read, or has more entries than the model.
    """
    if examinee.respond is not None:
        return examinee.respond
    encoder, rows = make_encoder(examinee.data, examinee.spec), examinee.extent.batch_size

    def respond(samples: Sequence[Sample], max_new_tokens: int) -> list[str | BadSample]:
        prompts: list[Example | BadSample] = []
        for sample in samples:
            try:
                prompts.append(encoder.prompt(sample))
            except BadSample as error:
                prompts.append(error)
        good = [prompt for prompt in prompts if not isinstance(prompt, BadSample)]
        if not good:
            return [prompt for prompt in prompts if isinstance(prompt, BadSample)]
        batch = full_batch(good, encoder, rows=rows, length_multiple=_LENGTH_MULTIPLE, pad_left=True)
        said = iter(generated(examinee, batch, encoder.tokenizer, max_new_tokens))
        return [prompt if isinstance(prompt, BadSample) else next(said) for prompt in prompts]

    return respond


def ask(
    examinee: Examinee, samples: Sequence[Sample], file: PredictionFile, *, max_new_tokens: int
) -> dict[str, str]:
    """Asks what the file does not have yet, and appends it; predictions by id, of all samples.

    A sample that cannot be asked, such as one that does not fit, has an empty prediction and its reason. A
    batch is always made of the same samples, so that going on gives what an undisturbed evaluation gives.
    """
    size = examinee.extent.batch_size
    starts = [
        s for s in range(0, len(samples), size) if any(x.id not in file.done for x in samples[s : s + size])
    ]
    if starts:
        respond = respond_with(examinee)
        for start in track(starts, examinee.source, console=Console(stderr=True)):
            examinee.alive()
            chosen = samples[start : start + size]
            rows = []
            for sample, said in zip(chosen, respond(chosen, max_new_tokens), strict=True):
                if isinstance(said, BadSample):
                    logger.warning("counted as unanswered: %s", said)
                    rows.append({"id": sample.id, "prediction": "", "problem": str(said)})
                else:
                    rows.append({"id": sample.id, "prediction": said})
            file.append(row for row in rows if row["id"] not in file.done)
    return {sample.id: file.done[sample.id]["prediction"] for sample in samples}
