"""The best checkpoints of a run, by a score of evaluation; they stay beside the newest ones.

    metrics of a step --> Best.add --> best.json --> Best.steps --> what the checkpointer keeps

    {"score": "heldout/accuracy", "steps": {"500": 0.61, "1000": 0.64}}

The metrics of a step hold scores where ``loop.evaluate_every`` had the model examined.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from vl_jax.runtime import disk

BEST_FILE = "best.json"  # in the folder of a run


@dataclasses.dataclass(frozen=True)
class BestConfig:
    """Which checkpoints stay because evaluation found them good."""

    keep: int = 0  # how many stay beside the newest ones; 0: none
    score: str = ""  # by which: ``<source>/<score>`` or ``<source>/loss``, as ``evaluate_every`` logs them
    order: Literal["highest", "lowest"] = "highest"  # which value of the score is the best

    def __post_init__(self):
        if self.keep < 0:
            raise ValueError(f"keep={self.keep} must be >= 0")
        if self.keep and not self.score:
            raise ValueError("score='' must name a score if keep > 0, such as 'heldout/exact_match'")


class Best:
    """The score of every step that was evaluated; it is on disk, so that a resumed run knows it too."""

    def __init__(self, config: BestConfig, workdir: Path):
        """Reads what the run knows already.

        Raises:
          ValueError: the file was damaged; or it has another score.
        """
        self._config, self._path = config, workdir / BEST_FILE
        self._scores = _read(self._path, config) if config.keep else {}

    def add(self, step: int, metrics: Mapping[str, Any]) -> bool:
        """Takes the metrics of a step, and says whether the step is one of the best.

        Args:
          metrics: scores are under ``eval/``; without any, the model was not examined at this step. A score
            that is not finite is never good.

        Raises:
          ValueError: there is no such score.
        """
        prefix, name = "eval/", self._config.score
        scores = {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
        if not self._config.keep or not scores:
            return False
        if name not in scores:
            raise ValueError(f"config.loop.best.score={name!r}: evaluation gives {', '.join(scores)}")
        value = scores[name]
        self._scores.pop(step, None)
        if math.isfinite(value):
            self._scores[step] = float(value)
        self._write()
        return step in self.steps()

    def go_on_from(self, step: int) -> None:
        """Forgets the scores of later steps: their checkpoints are gone, and the run takes them again."""
        later = [known for known in self._scores if known > step]
        for known in later:
            del self._scores[known]
        if later:
            self._write()

    def _write(self) -> None:
        if jax.process_index() == 0:
            steps = {str(step): self._scores[step] for step in sorted(self._scores)}
            text = json.dumps({"score": self._config.score, "steps": steps}, indent=2, ensure_ascii=False)
            disk.write_text(self._path, text + "\n")

    def steps(self) -> set[int]:
        """The best steps; of equal ones the later."""
        sign = 1 if self._config.order == "highest" else -1
        ranked = sorted(self._scores, key=lambda step: (sign * self._scores[step], step), reverse=True)
        return set(ranked[: self._config.keep])


def _read(path: Path, config: BestConfig) -> dict[int, float]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        score, steps = found["score"], {int(step): float(v) for step, v in found["steps"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path}: cut or damaged ({error}); delete it, and the run goes on without the scores so far"
        ) from None
    return steps if score == config.score else {}
