"""``convert-data``: a source of an experiment to ArrayRecord files, and the lengths that packing needs."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TaskID

from vl_jax.data.config import find_source, opened
from vl_jax.data.encode import make_encoder
from vl_jax.data.sources.array_records import ENDING, ArrayRecordConfig
from vl_jax.data.stream import packed
from vl_jax.data.tools import long_text
from vl_jax.data.tools.convert import REPORT, WHOLE, Share, Split, Unfinished, convert
from vl_jax.experiment import Experiment, model_spec


def run(experiment: Experiment, name: str, target: Path, share: Share = WHOLE) -> ArrayRecordConfig | None:
    """Converts a source, prints the report, and gives the config that takes the source's place.

    Args:
      share: of this worker, where several convert the source together; None comes back while files of others
        are missing.

    Raises:
      ValueError: there is no such source, it cannot be read, the folder holds something else, or no record
        can be used.
    """
    console, data = Console(), experiment.data
    config = find_source(data, name)
    source = opened(data, config)
    labels = [f"compare pictures of {name}"] if data.conversation.merge_turns > 1 else []
    with _bars(console, *labels, f"convert {name}") as bars:
        report = convert(
            config,
            source,
            target,
            num_threads=data.loading.num_threads,
            split=_splitter(experiment) if data.conversation.long_text == "split" else None,
            merge_turns=data.conversation.merge_turns,
            orientation=data.tiling.orientation,
            share=share,
            progress=bars[-1],
            comparing=bars[0],
        )
    if isinstance(report, Unfinished):
        console.print(f"{target}: {report}", markup=False, highlight=False, soft_wrap=True)
        return None
    console.print(
        f"{target}: {report}; listed in {target / REPORT}", markup=False, highlight=False, soft_wrap=True
    )
    if not report.records:
        first = next(iter(report.skipped.values()), "the source is empty")
        raise ValueError(f"{target}: no record can be used; delete it once this is put right: {first}")
    pattern = os.path.join(os.path.relpath(target, data.root), f"*{ENDING}")
    converted = ArrayRecordConfig(name, pattern)
    if data.packing is not None and data.packing.index:
        alone = dataclasses.replace(data, sources=(converted,), evaluation=())
        for stage in {stage.targets: stage for stage in experiment.stages}.values():
            with _bars(console, f"measure {name} ({stage.targets})") as (progress,):
                packed.open_planner(alone, model_spec(experiment), targets=stage.targets, progress=progress)
    console.print(f"in the experiment file: {converted!r}", markup=False, highlight=False, soft_wrap=True)
    return converted


def _splitter(experiment: Experiment) -> Split:
    data = experiment.data
    tokenizer = make_encoder(data, model_spec(experiment)).tokenizer
    return functools.partial(
        long_text.split, tokenizer=tokenizer, max_tokens=data.max_tokens, turns=data.conversation.turns
    )


@contextmanager
def _bars(console: Console, *labels: str) -> Iterator[list[Callable[[int, int], None]]]:
    """Progress lines; each is told how many are done, and of how many."""
    with Progress(console=console) as bars:
        yield [functools.partial(_update, bars, bars.add_task(label, total=None)) for label in labels]


def _update(bars: Progress, task: TaskID, done: int, total: int) -> None:
    bars.update(task, completed=done, total=total)
