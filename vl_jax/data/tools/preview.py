"""Looking at data: the tokens of encoded samples with their label mask, and the tiles behind them."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from PIL import Image as PilImage

from vl_jax.data.config import DataConfig, ModelSpec, find_source, opened
from vl_jax.data.encode import Encoder, make_encoder
from vl_jax.data.example import Example
from vl_jax.data.images.augment import augment
from vl_jax.data.images.mosaic import can_join, mosaic
from vl_jax.data.sample import BadSample, Sample, Source
from vl_jax.data.text import grounding
from vl_jax.data.text.chat import Targets
from vl_jax.data.text.tokenizer import Tokenizer
from vl_jax.data.tools.media_pictures import media_pictures
from vl_jax.data.tools.overlay import Overlay, overlays

_AUGMENTED = 2  # draws shown beside a picture


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens of one branch that are all targets, all visual, or neither."""

    text: str
    branch: int
    is_target: bool
    num_visual: int  # 0 for text


@dataclass(frozen=True)
class Preview:
    """One encoded sample to look at, or why it cannot be used."""

    id: str
    spans: tuple[Span, ...]
    tiles: tuple[PilImage.Image, ...]
    boxed: tuple[PilImage.Image, ...]  # the picture with the boxes of all turns, if it has any
    augmented: tuple[PilImage.Image, ...]  # draws of it as training sees it, with its boxes
    labelled: tuple[Overlay, ...]  # the picture with each label that lies in it
    media: tuple[Overlay, ...]  # inputs of other kinds, drawn
    num_tokens: int
    num_targets: int
    error: str = ""


def render_samples(
    config: DataConfig,
    spec: ModelSpec,
    source_name: str,
    *,
    count: int = 4,
    first: int = 0,
    targets: Targets = "answers",
) -> list[Preview]:
    """Encodes a few samples of a source just as training does, before turns are chosen at random."""
    encoder = make_encoder(config, spec)
    source = opened(config, find_source(config, source_name))
    fields: list[Any] = list(spec.labels)
    classes = {f.field: f.classes for f in fields if hasattr(f, "field") and hasattr(f, "classes")}
    previews = []
    for index in range(first, min(first + count, len(source))):
        try:
            sample = source[index]
            example = encoder.example(sample, turns=config.conversation.turns, targets=targets)
            boxed = _boxed(sample)
            augmented = _augmented(sample, config, encoder, source, classes)
            labelled, media = tuple(overlays(sample, classes)), tuple(media_pictures(sample))
        except BadSample as error:
            previews.append(Preview(f"{source_name}/{index}", (), (), (), (), (), (), 0, 0, error=str(error)))
            continue
        previews.append(
            Preview(
                id=example.id,
                spans=_spans(example, encoder.tokenizer),
                tiles=tuple(PilImage.fromarray(t) for t in example.tiles),
                boxed=boxed,
                augmented=augmented,
                labelled=labelled,
                media=media,
                num_tokens=len(example.tokens),
                num_targets=int((example.loss_weights > 0).sum()),
            )
        )
    return previews


def _boxed(sample: Sample) -> tuple[PilImage.Image, ...]:
    boxes = tuple(dict.fromkeys(box for turn in sample.turns for box in turn.boxes))
    if not boxes or len(sample.images) != 1:  # boxes do not say which of several pictures they are on
        return ()
    return (grounding.draw(sample.images[0](), boxes).picture,)


def _augmented(
    sample: Sample,
    config: DataConfig,
    encoder: Encoder,
    source: Source,
    classes: Mapping[str, Sequence[str]],
) -> tuple[PilImage.Image, ...]:
    """A few draws, each with the boxes in its text, or else with its first label that lies in the picture."""
    changes, shown = config.augmentation, []
    if changes is None or not sample.images:
        return ()
    for number in range(_AUGMENTED):
        rng, draw = np.random.default_rng((config.seed, number)), sample
        if changes.mosaic and rng.random() < changes.mosaic and can_join(sample):
            draw = mosaic(sample, source.__getitem__, len(source), rng, min_visible=changes.min_visible)
        draw = augment(draw, changes, rng, length=encoder.text_length)
        labelled = [overlay.picture for overlay in overlays(draw, classes)][:1]
        shown += _boxed(draw) or labelled or (draw.images[0](),)
    return tuple(shown)


def to_text(previews: Sequence[Preview]) -> str:
    """Previews for a terminal: targets in ``[[ ]]``, images as ``{N visual}``, one line a branch."""
    lines = []
    for preview in previews:
        lines.append(_title(preview))
        lines += [f"      input  {overlay.caption}" for overlay in preview.media]
        for branch, spans in groupby(preview.spans, key=lambda s: s.branch):
            name = f"branch {branch}" if branch else "trunk"
            body = "".join(_plain(s) for s in spans).replace("\n", "⏎")
            lines.append(f"  {name:>9}  {body}")
    return "\n".join(lines) + "\n"


def to_html(previews: Sequence[Preview]) -> str:
    """Previews as pieces of a page: green is supervised, violet stands for an image."""
    articles = []
    for preview in previews:
        pictures = "".join(f'<img alt="tile {i}" src="{_data_uri(t)}">' for i, t in enumerate(preview.tiles))
        pictures += "".join(f'<img class="picture" alt="boxes" src="{_data_uri(p)}">' for p in preview.boxed)
        pictures += "".join(_figure(overlay) for overlay in (*preview.labelled, *preview.media))
        pictures += "".join(
            f'<img class="picture" alt="augmented" src="{_data_uri(p)}">' for p in preview.augmented
        )
        branches = "".join(
            f'<span class="branch">{"".join(_markup(s) for s in spans)}</span>'
            for _, spans in groupby(preview.spans, key=lambda s: s.branch)
        )
        title = html.escape(_title(preview))
        articles.append(
            f'<div class="card preview"><h3>{title}</h3><div>{pictures}</div><pre>{branches}</pre></div>'
        )
    return "".join(articles)


def _figure(overlay: Overlay) -> str:
    caption = html.escape(overlay.caption)
    picture = f'<img class="picture" alt="label" src="{_data_uri(overlay.picture)}">'
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def _spans(example: Example, tokenizer: Tokenizer) -> tuple[Span, ...]:
    image_id = tokenizer.image
    # The target of a position is the next token, so a token is supervised if the one before it says so.
    supervised = [False, *(example.loss_weights[:-1] > 0)]
    keys = [
        (int(branch), bool(target), int(token) == image_id)
        for branch, target, token in zip(example.branch_ids, supervised, example.tokens, strict=True)
    ]
    spans, start = [], 0
    for (branch, target, visual), group in groupby(keys):
        length = len(list(group))
        text = "" if visual else tokenizer.decode(example.tokens[start : start + length].tolist())
        spans.append(Span(text, branch, target, length if visual else 0))
        start += length
    return tuple(spans)


def _title(preview: Preview) -> str:
    if preview.error:
        return f"{preview.id}: cannot be used: {preview.error}"
    counts = f"{preview.num_tokens} tokens, {preview.num_targets} targets, {len(preview.tiles)} tiles"
    return f"{preview.id}: {counts}"


def _plain(span: Span) -> str:
    if span.num_visual:
        return f"{{{span.num_visual} visual}}"
    return f"[[{span.text}]]" if span.is_target else span.text


def _markup(span: Span) -> str:
    if span.num_visual:
        return f'<span class="visual">[{span.num_visual} visual]</span>'
    text = html.escape(span.text)
    return f'<span class="target">{text}</span>' if span.is_target else text


def _data_uri(picture: PilImage.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
