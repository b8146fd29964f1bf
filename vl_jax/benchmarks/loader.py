"""How many samples a second of CPU time the loader gives, beside Pillow and torch's ``DataLoader``.

    this process: batches of ours | batches of theirs | ...  in turns, each from rest to rest

Both read the same folder and make the same tiles and the tokens of the same text; theirs is the plain loop
that one writes first, without a label mask or a layout of visual tokens. Between two turns everything comes
to rest, so that what threads and workers do ahead is counted, and counted where it belongs. Without torch, or
for sources that are not conversation files, ours runs alone.

With ``cache_mb`` ours is measured twice: once the records have been read, when pictures come from the cache
as far as it has room for them, and without a cache, as in an epoch that sees each for the first time. The
plain loop keeps no pictures.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PilImage
from tokenizers import Tokenizer

from vl_jax.benchmarks.step import machine, spread
from vl_jax.data.config import DataConfig, open_sources
from vl_jax.data.images import tiling
from vl_jax.data.sources.build import LlavaConfig
from vl_jax.data.text.tokenizer import ASSISTANT, EOS, USER, load_tokenizer
from vl_jax.experiment import Experiment, mixture, open_stream

BATCHES = 30  # of a turn
_MOST_READ_AHEAD = 20_000  # records of ours that are read before it is measured with a cache
_QUIET = 0.02  # seconds without work after which everything is taken to rest

_COLD = ", no cache"  # at the end of the name of ours when it keeps no pictures

Take = Callable[[int], int]  # takes so many batches and says how many samples they held


def run(experiment: Experiment, *, repeats: int = 9, json_file: Path | None = None) -> dict[str, Any]:
    """Measures the loader of an experiment's last stage, prints a table, and returns the figures.

    Raises:
      ValueError: there are no repeats, or a source cannot be read.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: must be at least 1")
    # Where images are withheld, we would have less to do.
    data = dataclasses.replace(experiment.data, image_dropout_rate=0.0)
    experiment = dataclasses.replace(experiment, data=data)
    rows = experiment.stages[-1].batch_size
    with contextlib.ExitStack() as stack:
        ways = {_name(data): stack.enter_context(ours(experiment))}
        if data.loading.cache_mb:
            uncached = dataclasses.replace(data, loading=dataclasses.replace(data.loading, cache_mb=0))
            cold = dataclasses.replace(experiment, data=uncached)
            ways[_name(data) + _COLD] = stack.enter_context(ours(cold))
            print(_fill_cache(ways[_name(data)], experiment))
        if reason := _no_rival(data):
            print(f"{reason}: only our side is measured")
        else:
            for workers in (0, 1):
                name = f"Pillow + DataLoader, {workers} workers"
                ways[name] = stack.enter_context(theirs(data, rows, workers))
        figures = measure(ways, repeats)
    result = {"benchmark": "loader", "unit": "samples per second", "repeats": repeats, "rows": rows}
    result |= {"data": dataclasses.asdict(data), "machine": machine(), "measured": figures}
    print(table(result))
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _name(data: DataConfig) -> str:
    loading = data.loading
    one, more = ("worker process", "worker processes") if loading.num_workers else ("thread", "threads")
    return f"ours, {loading.parallel} {one if loading.parallel == 1 else more}"


def _is_cold(name: str) -> bool:
    return name.endswith(_COLD)


def _no_rival(data: DataConfig) -> str:
    if importlib.util.find_spec("torch") is None:
        return "torch cannot be imported"
    strange = [s.name for s in data.sources if not (isinstance(s, LlavaConfig) and s.file.endswith(".json"))]
    return f"source {strange[0]!r} is not a conversation file in JSON" if strange else ""


def _fill_cache(take: Take, experiment: Experiment) -> str:
    """Reads every record once, or as many as are worth the time; says what that means for the figures."""
    opened, _ = open_sources(experiment.data, mixture(experiment, experiment.stages[-1]))
    records = sum(map(len, opened.values()))
    read = take(-(-min(records, _MOST_READ_AHEAD) // experiment.stages[-1].batch_size))
    return (
        f"ours has read {min(read, records)} of {records} records before: pictures come from its cache of "
        f"{experiment.data.loading.cache_mb} MiB, as in later epochs; 'no cache' is a first epoch"
    )


@contextlib.contextmanager
def ours(experiment: Experiment) -> Iterator[Take]:
    """The stream that training reads."""
    stream: Any = open_stream(experiment, experiment.stages[-1])

    def take(batches: int) -> int:
        samples = 0
        for _ in range(batches):
            next(stream)
            samples += sum(map(len, stream.ids))
        return samples

    try:
        yield take
    finally:
        stream.close()


@contextlib.contextmanager
def theirs(data: DataConfig, rows: int, workers: int) -> Iterator[Take]:
    """A ``Dataset`` of records and a ``DataLoader``."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(1)  # more of them spin while they wait, which would count against it
    dataset: Any = Records(data)
    loader = torch.utils.data.DataLoader(
        dataset,
        rows,
        sampler=torch.utils.data.RandomSampler(dataset, num_samples=1 << 40),
        num_workers=workers,
        collate_fn=collate,
        multiprocessing_context="spawn" if workers else None,  # a copy of a process with threads may hang
    )
    batches = iter(loader)

    def take(count: int) -> int:
        return sum(len(next(batches)[1]) for _ in range(count))

    yield take
    del batches, loader  # ends the workers


class Records:
    """What one writes for ``DataLoader``: records in memory, one picture and one text at a time."""

    def __init__(self, data: DataConfig):
        self._data = data
        self._tokenizer: Tokenizer | None = None
        self._records: list[tuple[Path, Any]] = []
        for source in data.sources:
            assert isinstance(source, LlavaConfig)
            file = Path(data.root) / source.file
            folder = Path(data.root) / source.root if source.root else file.parent
            self._records += [(folder, record) for record in json.loads(file.read_text(encoding="utf-8"))]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """The tiles u8[m 3 h w] and the token ids i64[t] of a record."""
        import torch  # pyright: ignore[reportMissingImports]

        folder, record = self._records[index]
        data, tiles = self._data, []
        names = record.get("image") or []
        names = [names] if isinstance(names, str) else names
        for name in names:
            with PilImage.open(folder / name) as file:
                picture = file.convert("RGB")
            grid = tiling.best_grid(*picture.size, data.tiling, num_images=len(names))
            tiles.append(tiling.make_tiles(picture, grid=grid, config=data.tiling))
        said = [message["value"] for message in record["conversations"]]
        pairs = list(zip(said[::2], said[1::2], strict=True))
        if data.conversation.max_turns is not None:
            pairs = random.sample(pairs, min(data.conversation.max_turns, len(pairs)))
        text = "".join(f"{USER}: {question}\n\n{ASSISTANT}:{answer}{EOS}" for question, answer in pairs)
        if self._tokenizer is None:  # in the worker
            self._tokenizer = Tokenizer.from_str(load_tokenizer(data.tokenizer).plain.to_str())
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids[: data.max_tokens]
        side = data.tiling.tile_size
        pixels = np.concatenate(tiles) if tiles else np.zeros((0, side, side, 3), np.uint8)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.tensor(ids)


def collate(samples: list[tuple[Any, Any]]) -> tuple[Any, Any]:
    """All tiles, and the ids padded to the longest."""
    import torch  # pyright: ignore[reportMissingImports]

    tiles, ids = zip(*samples, strict=True)
    return torch.cat(tiles), torch.nn.utils.rnn.pad_sequence(list(ids), batch_first=True)


def measure(ways: Mapping[str, Take], repeats: int) -> dict[str, dict[str, dict[str, float]]]:
    """Samples per second of CPU and of wall time of every way in turns.

    The ratio of each is the first one's to it, of CPU; ``ratio_without_cache`` that of ours without a cache.
    """
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(repeats + 1):  # the first one starts everything
        for name, take in ways.items():
            cpu, wall = cpu_seconds(), time.perf_counter()
            samples = take(BATCHES)
            wall = time.perf_counter() - wall
            cpu = _rest() - cpu
            if turn:
                turns[name].append((samples / cpu, samples / wall))
    sides = {"ratio": next(iter(turns.values()))}
    for name in filter(_is_cold, turns):
        sides["ratio_without_cache"] = turns[name]
    return {
        name: {
            "cpu": spread([c for c, _ in figures]),
            "wall": spread([w for _, w in figures]),
            **{
                ratio: spread([a / b for (a, _), (b, _) in zip(side, figures, strict=True)])
                for ratio, side in sides.items()
            },
        }
        for name, figures in turns.items()
    }


def cpu_seconds() -> float:
    """CPU time of this process and its workers so far."""
    total = time.process_time()
    for worker in multiprocessing.active_children():
        with contextlib.suppress(OSError):  # It may have just ended; or there is no such file on this system.
            fields = Path(f"/proc/{worker.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def _rest() -> float:
    """Waits until nothing works any more; the CPU time by then."""
    before, still = cpu_seconds(), 0
    while still < 3:
        time.sleep(_QUIET)
        now = cpu_seconds()
        still = still + 1 if now - before < 0.1 * _QUIET else 0
        before = now
    return before


def table(result: Mapping[str, Any]) -> str:
    """The figures as text: medians, and in brackets the lowest and the highest ratio."""
    note = "; without a cache" if any(map(_is_cold, result["measured"])) else ""
    lines = [
        f"{result['unit']}, rows of a batch: {result['rows']}; median of {result['repeats']} turns",
        f"{'':34}{'CPU time':>10}{'wall time':>11}   ours / this, of CPU time{note}",
    ]
    for name, figures in result["measured"].items():
        ratios = "; ".join(
            "{median:.2f} ({lowest:.2f} - {highest:.2f})".format(**figures[ratio])
            for ratio in ("ratio", "ratio_without_cache")
            if ratio in figures
        )
        lines.append(f"{name:34}{figures['cpu']['median']:10.0f}{figures['wall']['median']:11.0f}   {ratios}")
    return "\n".join(lines)
