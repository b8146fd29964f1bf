"""Evaluating a model on a source: answer every question, with and without the image, and score."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from PIL import Image as PilImage
from rich.console import Console
from rich.progress import track

from vl_jax import generation, sharding
from vl_jax.batch import Batch
from vl_jax.data.config import DataConfig, ModelSpec
from vl_jax.data.sample import BadSample
from vl_jax.data.sources.build import open_source
from vl_jax.data.stream.evaluation_prompts import evaluation_prompts
from vl_jax.data.text.tokenizer import Tokenizer, load_tokenizer
from vl_jax.evaluate.answers import Answer, Prior, summarize
from vl_jax.generation import GenerationConfig
from vl_jax.layout import Layout, put_batch

# Samples whose image is kept beside the predictions, for the report and for a person to look at.
NUM_PICTURES = 120


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What is asked of a trained model."""

    batch_size: int = 64
    limit: int = 0  # questions per source; 0: all
    per_sample: int = 0  # questions per image; 0: all
    max_new_tokens: int = 16
    prior_samples: int = 2000  # training samples that the prior baseline counts

    def __post_init__(self):
        if self.batch_size < 1 or self.max_new_tokens < 1:
            raise ValueError(
                f"batch_size={self.batch_size} and max_new_tokens={self.max_new_tokens} must be >= 1"
            )


def evaluate(
    layout: Layout,
    params: Any,
    routing_state: Any,
    *,
    data: DataConfig,
    spec: ModelSpec,
    config: EvaluationConfig,
    task: str,
    step: int,
    workdir: Path,
) -> dict[str, Any]:
    """Answers a held-out source; writes ``eval/<task>/<step>.json`` and the answers beside it.

    Returns:
      The content of the JSON file.
    """
    tokenizer = load_tokenizer(data.tokenizer)
    prior = Prior(_training_turns(data, config.prior_samples))
    generation.warn_if_not_causal(layout.model)

    def answered(with_image: bool) -> Iterator[tuple[dict[str, Any], str]]:
        batches = evaluation_prompts(
            data,
            spec,
            task,
            batch_size=config.batch_size,
            limit=config.limit,
            per_sample=config.per_sample,
            with_image=with_image,
        )
        for records, batch in batches:
            texts = _generate(layout, params, routing_state, batch, tokenizer, config)
            yield from zip(records, texts, strict=False)

    screen = Console(stderr=True)
    without = track(answered(False), f"{task}: image withheld", console=screen)
    blind = {record["id"]: text for record, text in without}
    answers, pictures = [], []
    for record, text in track(answered(True), f"{task}: with image", console=screen):
        kept = ("id", "question", "answer", "kind", "language")
        answers.append(
            Answer(
                **{k: record[k] for k in kept},
                prediction=text,
                blind_prediction=blind.get(record["id"], ""),
                prior_prediction=prior.predict(record["question"], record["kind"]),
            )
        )
        pictures.append((record["image"] if len(pictures) < NUM_PICTURES else None, record["boxes"]))
    result = {"task": task, "step": step, **summarize(answers)}
    if jax.process_index() == 0:
        _write(workdir / "eval" / task, step, result, answers, pictures)
    return result


def _generate(
    layout: Layout,
    params: Any,
    routing_state: Any,
    batch: Batch,
    tokenizer: Tokenizer,
    config: EvaluationConfig,
) -> list[str]:
    with sharding.use_mesh(layout.mesh, layout.rules):
        tokens = generation.generate(
            params,
            routing_state,
            put_batch(batch, layout),
            model=layout.model,
            config=GenerationConfig(max_new_tokens=config.max_new_tokens),
            stop=(tokenizer.eos,),
        )
    tokens = multihost_utils.process_allgather(tokens, tiled=True)
    return [tokenizer.decode(ids) for ids in generation.answer_ids(tokens, stop=(tokenizer.eos,))]


def _training_turns(data: DataConfig, count: int) -> Iterator[tuple[str, str, str]]:
    """(question, kind, answer) of the first samples of every training source."""
    for source_config in data.sources:
        source = open_source(source_config, root=data.root)
        for index in itertools.islice(range(len(source)), count):
            try:
                sample = source[index].without_images()
            except BadSample:
                continue  # counted and logged where it is trained on
            for turn in sample.turns:
                yield turn.question, turn.kind, turn.answer


def _write(
    folder: Path, step: int, result: dict[str, Any], answers: list[Answer], pictures: list[Any]
) -> None:
    """Writes answers and pictures first and the result last, so that a result is never without them."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (answer, (picture, boxes)) in enumerate(zip(answers, pictures, strict=True)):
        name = None
        if isinstance(picture, PilImage.Image):
            name = f"images/{step}_{number:04d}.png"
            picture.save(folder / name)
        line = {**dataclasses.asdict(answer), "image": name, "boxes": [dataclasses.asdict(b) for b in boxes]}
        lines.append(json.dumps(line, ensure_ascii=False))
    (folder / f"{step}.samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    temporary = folder / f"{step}.json.tmp"
    temporary.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, folder / f"{step}.json")
