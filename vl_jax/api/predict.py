"""Predicting: what a run's model says of one picture, sound or text, head by head.

a model that writes text    {"answer": "a red circle"}
a head of classes           {"label": {"shirt": 0.91, "dress": 0.05, ...}}, the likeliest first
a head of pairs             {"pairs": [{"text": "a small cat", "similarity": 0.83}, ...]}, the nearest first
a head of boxes             {"boxes": [{"label": "cat", "score": 0.9, "box": [x0, y0, x1, y1]}, ...]}
a head that draws           {"picture": {"picture": a PNG file in a data URL}}
a head that speaks          {"speech": {"seconds": 0.5, "sound": a WAV file in a data URL}}
a head that writes          {"words": "a red circle"}
any other head              {its name: what its ``decode`` gives}

Boxes are in pixels of the picture.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Float
from PIL import Image as PilImage

from vl_jax import ask, sharding
from vl_jax.api.calls import load_run
from vl_jax.api.part import heads_for
from vl_jax.api.run import Run
from vl_jax.batch import TILES, TOKENS, Batch
from vl_jax.data.images.audio import SoundImage
from vl_jax.data.images.tiling import shown
from vl_jax.data.sample import TEXT, FileImage, Sample, Turn, image_size
from vl_jax.evaluate.task import Examinee
from vl_jax.experiment import model_spec
from vl_jax.fusion.build import Apart
from vl_jax.generation.decode import Writer
from vl_jax.heads.image.flow import NOISE
from vl_jax.heads.pairs import PairVectors
from vl_jax.joint import Joint
from vl_jax.moe.stacks import RoutingState
from vl_jax.runtime import errors, start
from vl_jax.runtime.errors import UserError

ANSWER = "answer"  # the name under which a model that writes text says it
_NEAREST = 5
_POOL = 2000  # held-out samples that are looked through, where no candidates are given


def predict(
    run: Run | str | PathLike[str],
    *,
    image: str | PathLike[str] | None = None,
    audio: str | PathLike[str] | None = None,
    text: str = "",
    heads: str | Sequence[str] = (),
    candidates: Sequence[str] = (),
    max_new_tokens: int = 32,
    seed: int | None = None,
    task: str = "",
) -> dict[str, Any]:
    """What a run's model says, by head, as values that JSON can hold.

    Args:
      run: an open run (see ``load_run``), or its folder.
      image: file of a picture.
      audio: file of a sound, for a run that was trained on some.
      text: the question, for a model that answers; what is written, for a tower that reads text.
      heads: names of those to ask; none: all that can say something of what is given.
      candidates: of a head of pairs, the texts that are compared with the picture; none: those of the
        experiment's first held-out source.
      max_new_tokens: of an answer.
      seed: of what a head makes out of noise; None: that of its config.
      task: in place of ``heads``: the head that does this task of the model's.

    Raises:
      UserError: the folder holds no run, there is no such head or task, or the model needs something else.
    """
    start.set_up()
    names = (heads,) if isinstance(heads, str) else tuple(heads)
    opened = run if isinstance(run, Run) else load_run(run, heads=names, task=task)
    given = _Given(None if image is None else Path(image), None if audio is None else Path(audio), text)
    with errors.told():
        model = opened.layout.model
        if task:
            names = heads_for(model.config, opened.workdir, task, names)
        if isinstance(model, Writer):
            return {ANSWER: _answer(opened, given, names, max_new_tokens)}
        if not isinstance(model, Joint):
            kind = type(opened.experiment.model).__name__
            raise UserError(
                f"{opened.workdir}: its model is a {kind}; only models with heads or text can say"
            )
        return _say(opened, given, names, tuple(candidates), seed)


def made(run: Run, said: Mapping[str, Any]) -> bytes:
    """The file of the picture or the sound that a head of an open run made.

    Args:
      said: what ``predict`` gave, by head.

    Raises:
      UserError: no head of those that said something makes a file, or several do.
    """
    heads = {head.name: head for head in getattr(run.layout.model.config, "heads", ())}
    able = [name for name in said if hasattr(heads.get(name), "made")]
    if len(able) != 1:
        raise UserError(
            f"expected one head that makes a file, found {', '.join(able) or 'none'} among "
            f"{', '.join(said)}; name one, with --head"
        )
    return heads[able[0]].made(said[able[0]])


def draw(run: Run, said: Mapping[str, Any], image: str | PathLike[str]) -> PilImage.Image:
    """What the heads of an open run said of a picture, drawn on it: on the tile, where they say maps of that.

    Args:
      said: what ``predict`` gave, by head. Each head that has ``draw`` draws its own picture; they stand
        side by side.

    Raises:
      UserError: no head of those that said something can draw.
    """
    start.set_up()
    with errors.told():
        heads = {head.name: head for head in getattr(run.layout.model.config, "heads", ())}
        able = [name for name in said if hasattr(heads.get(name), "draw")]
        if not able:
            known = ", ".join(said)
            raise UserError(f"nothing to draw: no head of {known} has draw()")
        sample = _Given(Path(image), None, "").sample(run)
        tile, picture = PilImage.fromarray(run.encoder.prompt(sample).tiles[0]), sample.images[0]()
        drawn = [
            heads[name].draw(picture if hasattr(heads[name], "decode_in") else tile, said[name])
            for name in able
        ]
    width, height = sum(picture.width for picture in drawn), max(picture.height for picture in drawn)
    result, left = PilImage.new("RGB", (width, height), (255, 255, 255)), 0
    for picture in drawn:
        result.paste(picture, (left, 0))
        left += picture.width
    return result


@dataclasses.dataclass(frozen=True)
class _Given:
    """What is to be looked at."""

    image: Path | None
    audio: Path | None
    text: str

    def sample(self, run: Run) -> Sample:
        """It as a sample of the run's data."""
        images: list[Any] = []
        if self.image:
            orientation = run.experiment.data.tiling.orientation
            images.append(FileImage(self.image, where="--image", orientation=orientation))
        if self.audio:
            images.append(SoundImage(self.audio, "--audio", ask.hearing(run.experiment)))
        return Sample("prediction", (Turn("", self.text, kind=TEXT),), tuple(images))

    def has(self, kind: str) -> bool:
        """Whether there is something for a tower that reads tiles or tokens."""
        return bool(self.image or self.audio) if kind == TILES else kind == TOKENS and bool(self.text)


def _answer(run: Run, given: _Given, names: Sequence[str], max_new_tokens: int) -> str:
    unknown = [name for name in names if name != ANSWER]
    if unknown:
        raise UserError(f"--head={unknown[0]}: the model writes text, it has no heads but {ANSWER!r}")
    if not given.text:
        raise UserError("the model answers a question: give one, with --text")
    asked = ask.AskedRun(run.experiment, run.layout, run.state, run.encoder)
    pieces = asked.stream(given.text, image=given.image, audio=given.audio, max_new_tokens=max_new_tokens)
    return "".join(pieces)


def _say(
    run: Run, given: _Given, names: Sequence[str], candidates: Sequence[str], seed: int | None
) -> dict[str, Any]:
    """What the heads of a joint model say."""
    model: Any = run.layout.model.config
    asked = [model.head(name) for name in names] or list(model.heads)
    lacking = {head.name: _lacks(model, head, given) for head in asked}
    able = [head for head in asked if not lacking[head.name]]
    if names and len(able) < len(asked) or not able:
        name = next(name for name, reason in lacking.items() if reason)
        raise UserError(f"head {name!r} {lacking[name]}")
    sample = given.sample(run)
    (found,) = _predictions(run, [sample], seed)
    result = {}
    for head in able:
        prediction = found[head.name]
        if isinstance(prediction, PairVectors):
            result[head.name] = _nearest(run, head, prediction, given, candidates)
        elif hasattr(head, "probabilities"):
            result[head.name] = head.probabilities(prediction)
        elif hasattr(head, "decode_in") and sample.images:
            size = image_size(sample.images[0])
            cut = shown(size, run.experiment.data.tiling)
            result[head.name] = head.decode_in(prediction, cut, size)
        elif hasattr(head, "decode"):
            result[head.name] = head.decode(prediction)
        elif names:
            raise UserError(
                f"head {head.name!r}: a {type(head).__name__} has no decode(), so it says nothing"
            )
    if not result:
        raise UserError(f"no head of {run.workdir} has decode(), so none says anything")
    return result


def _lacks(model: Any, head: Any, given: _Given) -> str:
    """What a head needs that is not given; empty if nothing."""
    apart = isinstance(model.fusion, Apart)
    needed = {t.input for t in model.towers if not apart or t.name in head.inputs}
    missing = sorted(kind for kind in needed if not given.has(kind))
    if hasattr(head, "image") and hasattr(head, "text") and len(missing) < len(needed):
        return ""  # one side is compared with many of the other
    if not missing:
        return ""
    options = {TILES: "a picture: give --image (or --audio)", TOKENS: "text: give --text"}
    return "reads " + " and ".join(
        options.get(kind, f"{kind!r}, which cannot be given here") for kind in missing
    )


def _nearest(
    run: Run, head: Any, prediction: PairVectors, given: _Given, candidates: Sequence[str]
) -> list[dict[str, Any]]:
    """The texts nearest to a picture, or the pictures nearest to a text."""
    by_text = given.has(TILES)
    side = "text" if by_text else "image"
    names, vectors = [], []
    if candidates:
        if not by_text:
            raise UserError("candidates are texts, to be compared with a picture: give --image")
        names = [{"text": text} for text in candidates]
        samples = [Sample(text, (Turn("", text, kind=TEXT),)) for text in candidates]
        vectors = [getattr(found[head.name], side) for found in _predictions(run, samples)]
    else:
        for name, found in _held_out(run, head.name, side):
            names.append(name)
            vectors.append(getattr(found, side))
    if not vectors:
        raise UserError(
            f"no sample of {run.experiment.data.evaluation[0].name!r} has a {side} to compare with"
        )
    return ranked(names, np.stack(vectors), np.asarray(getattr(prediction, "image" if by_text else "text")))


def ranked(
    names: Sequence[dict[str, Any]], vectors: Float[np.ndarray, "N E"], query: Float[np.ndarray, " E"]
) -> list[dict[str, Any]]:
    """The few that are nearest to a query, the nearest first, each with its similarity: the cosine."""
    near = vectors @ query
    order = np.argsort(-near, kind="stable")[:_NEAREST]
    return [{**names[i], "similarity": round(float(near[i]), 4)} for i in order]


def _held_out(run: Run, head: str, side: str) -> Iterator[tuple[dict[str, Any], PairVectors]]:
    """Texts or pictures of the first held-out source, each once, and their vectors."""
    data = run.experiment.data
    if not data.evaluation:
        raise UserError(
            "the experiment has no held-out source to compare with: give candidates (--candidates)"
        )
    seen: set[Any] = set()
    examinee = _examinee(run, data.evaluation[0].name)
    for records, batch in examinee.samples():
        found = examinee.apply(functools.partial(_compiled(run.layout.model), None), batch)[head]
        for row, record in enumerate(records):
            key = record["question"] if side == "text" else int(batch.labels[head].values[row])
            if key in seen or not key:
                continue
            seen.add(key)
            yield {"text": record["question"], "id": record["id"]}, _row(found, row)


def _predictions(run: Run, samples: Sequence[Sample], seed: int | None = None) -> list[dict[str, Any]]:
    """What the heads give for every sample, one row each."""
    say = functools.partial(_compiled(run.layout.model), seed)
    examinee, result = _examinee(run, ""), []
    size = sharding.batch_axes(run.layout.mesh)
    for begin in range(0, len(samples), size):
        rows = [[run.encoder.prompt(sample)] for sample in samples[begin : begin + size]]
        batch = run.encoder.collate([*rows, *[rows[-1]] * (size - len(rows))])
        found = examinee.apply(say, batch)
        result += [{name: _row(value, row) for name, value in found.items()} for row in range(len(rows))]
    return result


def _examinee(run: Run, source: str) -> Examinee:
    extent = run.experiment.evaluation
    extent = dataclasses.replace(extent, limit=extent.limit or _POOL)
    state, spec = run.state, model_spec(run.experiment)
    return Examinee(
        run.layout,
        state.params,
        state.routing,
        run.experiment.data,
        spec,
        source,
        extent,
        collections=state.collections,
    )


def _row(prediction: Any, row: int) -> Any:
    """One row of a prediction; what all rows share stays."""

    def pick(leaf: Float[np.ndarray, "..."]) -> Any:
        return leaf[row] if np.ndim(leaf) else leaf

    return jax.tree.map(pick, prediction)


@functools.cache
def _compiled(model: nn.Module) -> Any:
    """What all heads give for a batch, those that make something out of noise for a seed or their own."""

    def run(seed: Any, variables: Any, state: RoutingState, batch: Batch) -> dict[str, Any]:
        rngs = None if seed is None else {NOISE: jax.random.key(seed)}
        output: Any = model.apply(variables, batch, state, rngs=rngs)
        return output.predictions

    return jax.jit(run)
