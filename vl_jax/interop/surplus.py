"""What a published folder holds beyond the model that is read from it, and may be passed over.

A head that repeats the embedding table, layers that predict further tokens in training (DeepSeek-V3), the
parts of an image-text pair around its image encoder, tables of numbers that follow from the config.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vl_jax.interop.folder import Weights
from vl_jax.interop.rules import Rule
from vl_jax.interop.vision_language import FAMILIES as VISION_LANGUAGE
from vl_jax.interop.vision_language import IGNORED

logger = logging.getLogger(__name__)

HEAD, TABLE = "language/head/kernel", "language/embedding"
_LAYER = "layers.{layer}."
_TABLES = (r"(.*\.)?rotary_emb\.(cos_cached|sin_cached|original_inv_freq)",)
_FURTHER_TOKENS = (r"(.*\.)?mtp(_layers|_block|_head)?\..*",)
# Beside an image encoder that was taken out of a pair; one that has no head, but whose file has; and what
# models of the same tensor names need for pictures in several tiles.
_PAIR = r"(.*\.)?(text_model\..*|logit_scale|logit_bias|(visual|text)_projection\.(weight|bias))"
_PICTURES = (
    _PAIR,
    r"(.*\.)?vision_model\.head\..*",
    r"(.*\.)?vision_tower\.head\..*",
    r"(.*\.)?image_newline",
)


def passed_over(
    fields: Mapping[str, Any], layers: int, table: Sequence[Rule], keys: Iterable[str]
) -> list[str]:
    """Regular expressions of the tensors that may go unused.

    Args:
      fields: the published config.
      layers: of the language model; 0: there is none.
      table: the rules of the checkpoint.
      keys: the names of its tensors.
    """
    result = [*IGNORED, *_TABLES, *_FURTHER_TOKENS]
    if fields.get("model_type") in VISION_LANGUAGE:
        result += _PICTURES
    return result + (_further_layers(fields, layers, table, set(keys)) if layers else [])


def _further_layers(
    fields: Mapping[str, Any], layers: int, table: Sequence[Rule], keys: set[str]
) -> list[str]:
    """Layers behind the last one that the config counts, if they are modules for further tokens."""
    sources = [rule.source for rule in table if rule.target.startswith("language/") and _LAYER in rule.source]
    if not sources:
        return []
    before = sources[0].partition(_LAYER)[0] + "layers."
    parts = [
        fields,
        *(fields[k] for k in ("text_config", "language_config") if isinstance(fields.get(k), Mapping)),
    ]
    announced = max(int(part.get("num_nextn_predict_layers") or 0) for part in parts)
    numbered = re.compile(re.escape(before) + r"(\d+)\.")
    numbers = {int(match[1]) for key in keys if (match := numbered.match(key))}
    further = [
        n
        for n in sorted(numbers)
        if n >= layers and (n < layers + announced or f"{before}{n}.eh_proj.weight" in keys)
    ]
    if further:
        logger.info("layers %s predict further tokens; they are not loaded", further)
    return [rf"{re.escape(before)}{n}\..*" for n in further]


def find_tied(table: Sequence[Rule], keys: Iterable[str]) -> tuple[str, str] | None:
    """The keys of head and embedding table, where rules and checkpoint have both."""
    sources = {rule.target: rule.source for rule in table}
    head, embedding, keys = sources.get(HEAD), sources.get(TABLE), set(keys)
    return (head, embedding) if head in keys and embedding in keys and head and embedding else None


def from_head(table: Sequence[Rule], keys: Iterable[str]) -> tuple[Rule, ...]:
    """The rules, for a checkpoint that stores a tied table under the name of the head alone."""
    sources, keys = {rule.target: rule.source for rule in table}, set(keys)
    head = sources.get(HEAD)
    if head is None or head not in keys or sources.get(TABLE) in keys:
        return tuple(table)
    return tuple(
        Rule(head, rule.target, rule.axes) if rule.target == TABLE else rule
        for rule in table
        if rule.target != HEAD
    )


def equal(weights: Weights, one: str, other: str) -> bool:
    """Whether two tensors hold the same numbers; a few rows are compared at a time."""
    if weights.entries[one].shape != weights.entries[other].shape:
        return False
    a, b = weights[one], weights[other]
    step = max(1, (4 << 20) // max(1, int(np.prod(a.shape[1:], dtype=np.int64))))

    def numbers(x: np.ndarray, start: int) -> np.ndarray:
        part = np.atleast_1d(x)[start : start + step]
        return np.ascontiguousarray(part).view(np.uint8) if a.dtype == b.dtype else part.astype(np.float64)

    return all(np.array_equal(numbers(a, i), numbers(b, i)) for i in range(0, len(np.atleast_1d(a)), step))
