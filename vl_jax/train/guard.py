"""Updates that would harm the model: the step skips them, and a run follows, counts and describes them.

    state, metrics = guarded(step)(state, batch, learning rate, limit)     inside the compiled program
    guard.watch(moment, metrics, samples)                                  on the host, a little behind

A skipped update leaves everything as it was but the number of the step, and the next step reads the next
batch.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from vl_jax.batch import Batch
from vl_jax.metrics import truncate
from vl_jax.runtime import disk
from vl_jax.train.hooks import Moment
from vl_jax.train.step import GRADIENT_NORMS, Metrics, Step, TrainState

logger = logging.getLogger(__name__)

SKIPPED_FILE = "skipped_updates.jsonl"
SKIPPED = "skipped_updates"  # in the log of a run, once there are any
_SOUND = "sound"
# How many steps the host is behind: the device works on the next one while it reads the figures of the last.
BEHIND = 2

GuardedStep = Callable[..., tuple[TrainState, Metrics]]


class UpdatesSkipped(ValueError):
    """Too many updates in a row were skipped; the message names the step and where more is written."""


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """Which updates are skipped beside those that are not finite, and how many in a row end a run."""

    max_in_a_row: int = 10
    spike_factor: float = 0.0  # a gradient norm above so many medians is a spike; 0: none is
    spike_window: int = 100  # steps that the median is of; before there are so many no update is a spike

    def __post_init__(self):
        if self.max_in_a_row < 1 or self.spike_window < 1:
            raise ValueError(
                f"max_in_a_row={self.max_in_a_row} and spike_window={self.spike_window} must be >= 1"
            )
        if self.spike_factor and self.spike_factor <= 1:
            raise ValueError(
                f"spike_factor={self.spike_factor}: must be above 1, or 0 to skip no finite update"
            )


def guarded(step: Step) -> GuardedStep:
    """The step that skips an update if loss or gradient norm is not finite, or the norm is above a limit."""

    def safe(
        state: TrainState, batch: Batch, learning_rate: ArrayLike, limit: ArrayLike = np.inf
    ) -> tuple[TrainState, Metrics]:
        new, metrics = step(state, batch, learning_rate)
        sound = jnp.bool_(True)
        for name in ("loss", "grad_norm"):
            if name in metrics:  # A wrapper may have left it out.
                sound &= jnp.isfinite(metrics[name])
        if "grad_norm" in metrics:
            sound &= metrics["grad_norm"].astype(jnp.float32) <= limit
        # What the step passed on is not looked at: it is the same either way.
        kept = jax.tree.map(lambda a, b: a if a is b else jnp.where(sound, a, b), new, state)
        return dataclasses.replace(kept, step=new.step), metrics | {_SOUND: sound}

    return safe


@dataclasses.dataclass(frozen=True)
class _Update:
    """An update whose figures may still be on the device."""

    moment: Moment
    figures: Metrics
    limit: float
    names: Sequence[str]  # of its single gradient norms
    samples: Sequence[Sequence[str]]  # ids of the samples in each row


class Guard:
    """Follows the updates of a run; its state is part of a checkpoint."""

    def __init__(self, config: GuardConfig, logs: Path, *, state: dict[str, Any] | None, step: int):
        """Goes on from a checkpoint, or begins.

        Args:
          logs: the folder of its file.
          state: what ``get_state`` gave; None at the beginning.
          step: of the checkpoint; what is written of later steps is dropped.
        """
        state = state or {}
        self._config = config
        self._path = logs / (f"{jax.process_index()}.{SKIPPED_FILE}" if jax.process_index() else SKIPPED_FILE)
        self._in_a_row: int = state.get("in_a_row", 0)
        self._norms = deque(map(tuple, state.get("norms", ())), maxlen=config.spike_window + BEHIND)
        self._waiting: deque[_Update] = deque()
        self._names: Sequence[str] = ()
        self.skipped: int = state.get("skipped", 0)  # among the updates that it has looked at
        truncate(self._path, first_step=step + 1)

    def begin_stage(self, names: Sequence[str], *, anew: bool) -> None:
        """Notes what the gradient norms of a stage are of; at its beginning, that it has had none."""
        self._names = names
        if anew:
            self._norms.clear()

    def get_state(self) -> dict[str, Any]:
        """What a checkpoint holds of it, as JSON-able values; call ``settle`` first."""
        norms = [list(pair) for pair in self._norms] if self._config.spike_factor else []
        return {"skipped": self.skipped, "in_a_row": self._in_a_row, "norms": norms}

    def limit(self, step: int) -> float:
        """The gradient norm above which the update of a step is skipped.

        It follows from the norms up to ``BEHIND`` steps before, whether the host knows later ones or not: a
        run that was interrupted skips the same updates.
        """
        config = self._config
        if not config.spike_factor:
            return math.inf
        norms = [norm for at, norm in self._norms if at < step - BEHIND][-config.spike_window :]
        if len(norms) < config.spike_window:
            return math.inf
        return config.spike_factor * statistics.median(norms)

    def watch(
        self, moment: Moment, metrics: Metrics, limit: float, samples: Sequence[Sequence[str]]
    ) -> Metrics:
        """Takes the figures of a step that may still run, and looks at those of an earlier one.

        Returns:
          The metrics without what is meant for it alone.

        Raises:
          UpdatesSkipped: too many updates in a row were skipped.
        """
        metrics = dict(metrics)
        own = {name: metrics.pop(name) for name in (_SOUND, GRADIENT_NORMS) if name in metrics}
        shown = {name: metrics[name] for name in ("loss", "grad_norm") if name in metrics}
        self._waiting.append(_Update(moment, own | shown, limit, self._names, samples))
        while len(self._waiting) > BEHIND:
            self._look(self._waiting.popleft())
        return metrics

    def settle(self) -> None:
        """Looks at all that it has taken; waits until it has been computed.

        Raises:
          UpdatesSkipped: too many updates in a row were skipped.
        """
        while self._waiting:
            self._look(self._waiting.popleft())

    def _look(self, update: _Update) -> None:
        figures, config = update.figures, self._config
        norm = float(figures["grad_norm"]) if "grad_norm" in figures else math.nan
        if config.spike_factor and math.isfinite(norm):
            self._norms.append((update.moment.global_step, norm))
        if bool(figures[_SOUND]):
            self._in_a_row = 0
            return
        self.skipped, self._in_a_row = self.skipped + 1, self._in_a_row + 1
        loss = float(figures.get("loss", math.nan))
        why = f"loss is {loss:.6g}, gradient norm {norm:.6g}"
        if math.isfinite(loss) and norm > update.limit:
            why = f"gradient norm {norm:.6g} is above {update.limit:.6g}"
        self._write(update, why, loss, norm)
        step = f"the update of step {update.moment.global_step} was skipped: {why}"
        if self._in_a_row < config.max_in_a_row:
            logger.warning("%s; its samples and gradients are in %s", step, self._path)
            return
        raise UpdatesSkipped(
            f"{step}; so were the {self._in_a_row - 1} before it "
            f"(config.loop.guard.max_in_a_row={config.max_in_a_row}); the parameters are those of step "
            f"{update.moment.global_step - self._in_a_row}; samples and gradients are in {self._path}: mend "
            "the data, or set a lower learning rate"
        )

    def _write(self, update: _Update, why: str, loss: float, norm: float) -> None:
        """Adds a line about a skipped update to the file."""
        norms = np.asarray(update.figures.get(GRADIENT_NORMS, ()), np.float64).tolist()
        line = {
            "step": update.moment.global_step,
            "stage": update.moment.stage.name,
            "why": why,
            "loss": _plain(loss),
            "grad_norm": _plain(norm),
            "samples": [list(row) for row in update.samples],
            GRADIENT_NORMS: dict(zip(update.names, map(_plain, norms), strict=False)),
        }
        content = json.dumps(line, ensure_ascii=False) + "\n"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with disk.naming(self._path, needed=len(content)), self._path.open("a", encoding="utf-8") as file:
            file.write(content)


def _plain(value: float) -> float | str:
    """A number as JSON has it; it has no name for those that are not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else str(value)
