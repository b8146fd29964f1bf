"""What a person watching a run sees: a live line on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from vl_jax.metrics import objective_metrics
from vl_jax.train.clock import Pace

PLAIN_INTERVAL_S = 10.0


class Progress:
    """Shows stage, step, loss, what else the objective measures, speed and time remaining."""

    def __init__(self, total: int, done: int, *, quiet: bool = False):
        self._console = Console(quiet=quiet)
        self._total, self._stage = total, ""
        self._printed_at, self._pace = time.monotonic(), Pace()
        self._figures = ""
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TextColumn("ETA {task.fields[left]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total, completed=done, figures="", left="?")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def announce(self, stage: str, steps: int, table: list[tuple[str, int, int]]) -> None:
        """Prints what a stage trains, as it begins."""
        self._stage = stage
        self._pace.begin()
        view = Table(
            "module", "parameters", "trained", title=f"stage {stage}: {steps} steps", title_justify="left"
        )
        for module, size, trained in table:
            share = "all" if trained == size else ("frozen" if trained == 0 else f"{trained:,}")
            view.add_row(module, f"{size:,}", share)
        total, trained = sum(r[1] for r in table), sum(r[2] for r in table)
        view.add_row("total", f"{total:,}", f"{trained:,}")
        self._console.print(view)

    def update(self, step: int, figures: dict[str, float]) -> None:
        """Moves to a step; ``figures`` may be empty when nothing new was measured."""
        if figures:
            names = [name for name in ("loss", *objective_metrics(figures)) if name in figures]
            shown = [f"{name} {figures[name]:.3f}" for name in names]
            self._figures = "  ".join([*shown, f"{figures['tokens_per_second']:,.0f} tok/s"])
        self._pace.step()
        left = self._left(step)
        self._bar.update(
            self._task, completed=step, description=self._stage, figures=self._figures, left=left
        )
        now = time.monotonic()
        if not self._console.is_terminal and (
            now - self._printed_at > PLAIN_INTERVAL_S or step == self._total
        ):
            self._printed_at = now
            self._console.print(
                f"{self._stage} {step}/{self._total}  {self._figures}  ETA {left}", highlight=False
            )

    def _left(self, step: int) -> str:
        """The time that is left, in words; a question mark before there was a steady step."""
        seconds = 0.0 if step == self._total else self._pace.remaining(self._total - step)
        if seconds is None:
            return "?"
        minutes, rest = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
