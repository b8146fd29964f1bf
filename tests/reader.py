"""A reader who does what the pages say, in a folder with small data of the names that they use.

Commands and blocks are taken word for word. Flags behind them make models, data and runs small, and training
from Python is made small in the same way. What computes with a model is stood in for: a run claims its
folder, opens its sources, and leaves the files of a run; an answer is made up. So what a page says is done
with real files, options, fields, names of runs and rules of resuming, in its order; other tests compute.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
import threading
import types
import wave
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import exam_folders
import numpy as np
import pages
import pytest
import understudy
from pages import ROOT
from PIL import Image

from vl_jax import cli, config, schema
from vl_jax.api import calls
from vl_jax.experiment import Experiment

WIDTHS = {
    **dict.fromkeys(("embed_dim", "mlp_dim"), 16),
    **dict.fromkeys(("expert_dim", "kv_lora_rank", "head_dim", "dim"), 8),
    **dict.fromkeys(("qk_nope_dim", "qk_rope_dim", "v_head_dim"), 4),
    "num_heads": 2,
}
FINETUNE = {  # the published model is small already
    "model.dtype": "float32",
    "model.language.remat": "none",
    "data.max_tokens": 96,
    "data.max_tiles": 2,
}
# Options that a command has beside overrides; the last one given holds.
OPTIONS = {
    ("inspect", "data"): ("--examine=8", "--samples=1"),
    ("inspect", "routing"): ("--batches=1",),
    ("generate",): ("--max-new-tokens=2",),
    ("predict",): ("--max-new-tokens=2",),
    ("benchmark",): ("--repeats=1",),
}


def smaller(experiment: Experiment) -> dict[str, Any]:
    """Overrides that make an experiment small. Longer stages stay longer, so that runs can be extended."""
    changes: dict[str, Any] = {"evaluation.batch_size": 4}
    for stage in experiment.stages:
        changes |= {
            f"stages.{stage.name}.steps": -(-stage.steps // 400),
            f"stages.{stage.name}.batch_size": 4,
        }
    if hasattr(experiment.evaluation, "max_new_tokens"):
        changes |= {"evaluation.max_new_tokens": 2, "evaluation.prior_samples": 8}
    for source in experiment.data.evaluation:
        if hasattr(source, "num_examples"):
            changes[f"data.evaluation.{source.name}.num_examples"] = 2
    if "finetune" in experiment.name:
        return changes | FINETUNE
    if experiment.init.startswith("clip"):  # whose texts have six tokens
        return changes | {"data.max_tokens": 6}
    tree = json.loads(schema.to_json(experiment))["model"]
    # What a sweep may leave out is not touched.
    return changes | {f"model.{p}": WIDTHS[k] for p, k in _leaves(tree) if k in WIDTHS and ".moe." not in p}


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The dotted path of every number of a config, and its last part."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        elif isinstance(value, int) and not isinstance(value, bool):
            yield f"{prefix}{key}", key


class Reader:
    """Runs commands and blocks in a folder, one after another."""

    def __init__(self, folder: Path):
        self.folder, self.environment, self.done = folder, {}, set()

    def read(self, page: Path) -> None:
        """Does everything that is on a page."""
        names: dict[str, Any] = {"__name__": "__main__"}
        for block in pages.blocks(page):
            if block.language == "python":
                self._python(block, names)
            elif block.language == "bash":
                for command in pages.commands(block):
                    with _place(command):
                        self.run(command)

    def run(self, command: pages.Command) -> None:
        """Runs a command, unless something is lacking for it or it was run before."""
        lacks = command.lacks and not (command.ours and command.lacks in pages.ELSEWHERE)
        if lacks or (command.words, command.environment) in self.done:
            return
        self.done.add((command.words, command.environment))
        first = command.words[0]
        if command.ours:
            self._ours(command)
        elif first == "export":
            self.environment |= dict(word.split("=", 1) for word in command.words[1:])
        elif first == "python":
            self._script(*command.words[1:])
        else:
            given = {**os.environ, **self.environment, **dict(command.environment)}
            words = command.words if first in ("bash", "diff") else ("bash", *command.words)
            found = subprocess.run(words, env=given, capture_output=True, text=True, timeout=60)
            # diff says by 1 that there is a difference.
            assert found.returncode == (1 if first == "diff" else 0), found.stderr

    def _ours(self, command: pages.Command) -> None:
        words = [*command.ours, *added(command.ours)]
        devices = dict(command.environment).get("XLA_FLAGS", "").rpartition("device_count=")[2]
        if words[0] == "inspect" and devices:  # which jax is told before it starts
            given = {**os.environ, **dict(command.environment), "PYTHONPATH": str(ROOT)}
            subprocess.run([sys.executable, "-m", "vl_jax", *words], env=given, check=True, timeout=300)
            return
        with understudy.everything():
            assert cli.main(words) == 0, " ".join(words)

    def _script(self, name: str, *arguments: str) -> None:
        if "matplotlib" in Path(name).read_text() and importlib.util.find_spec("matplotlib") is None:
            return
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [name, *arguments])
            patch.setenv("MPLBACKEND", "agg")
            runpy.run_path(name, run_name="__main__")

    def _python(self, block: pages.Block, names: dict[str, Any]) -> None:
        if block.file:
            write_block(block, self.folder)
        elif not is_excerpt(block):
            before = set(threading.enumerate())
            with understudy.everything(), small_from_python():
                exec(compile(block.code, str(block), "exec"), names)
                for thread in set(threading.enumerate()) - before:
                    if (
                        isinstance(thread, threading.Thread)
                        and not thread.daemon
                        and thread.name[:7] == "Thread-"
                    ):
                        thread.join(600)


def added(words: Sequence[str]) -> list[str]:
    """The flags that make a command small."""
    more = [f for name, flags in OPTIONS.items() if tuple(words[: len(name)]) == name for f in flags]
    found = cli._parse(list(words))
    if not getattr(found, "config", None) or words[:2] in (("inspect", "config"), ("inspect", "params")):
        return more
    experiment = config.load(found.config, found.overrides)
    return more + [f"--config.{path}={value}" for path, value in smaller(experiment).items()]


@contextlib.contextmanager
def small_from_python() -> Iterator[None]:
    """Experiments that are loaded from Python are small, after what the code itself changes."""

    def load(spec: str, overrides: Sequence[tuple[str, str]] = ()) -> Experiment:
        given = tuple(overrides)
        changes = smaller(config.load(spec, given))
        return config.load(spec, (*given, *((path, str(value)) for path, value in changes.items())))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, "config", types.SimpleNamespace(load=load, replace=config.replace))
        yield


@contextlib.contextmanager
def _place(command: pages.Command) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(f"in: {' '.join(command.words)}")
        raise


def is_excerpt(block: pages.Block) -> bool:
    """Whether a block stands word for word in an experiment file, which runs elsewhere."""
    return any(block.code in file.read_text() for file in (ROOT / "experiments").glob("*.py"))


def write_block(block: pages.Block, folder: Path) -> None:
    """Writes the file that a block is, or adds to it."""
    file = folder / block.file
    with file.open("a" if block.adds else "w") as target:
        target.write(f"\n\n{block.code}" if block.adds else block.code)


def furnish(folder: Path) -> None:
    """The data that the pages name; published checkpoints are not among it."""
    for name in ("experiments", "tpu_scripts"):
        (folder / name).symlink_to(ROOT / name)
    for colour, file in (("red", "cat.png"), ("blue", "scene.png")):
        Image.new("RGB", (60, 40), colour).save(folder / file)
    records = []
    (folder / "my_vqa").mkdir()
    for number in range(8):
        label = ("dress", "hat")[number % 2]
        Image.new("RGB", (40, 40), (30 * number, 90, 200)).save(folder / f"my_vqa/{number}.png")
        records.append(
            {"id": str(number), "image": f"{number}.png", "label": label, **_said("<image>", label)}
        )
    _write_records(folder / "my_vqa", records)
    for name in ("my_data", "my_photos", "clothing", "twemoji"):
        shutil.copytree(folder / "my_vqa", folder / name)
    exam_folders.written("docvqa", folder / "DocVQA")
    rows = [{"id": str(number), "prediction": "red"} for number in range(100, 104)]
    (folder / "predictions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "fsdd_digits").mkdir()
    for digit in range(8):
        (folder / f"fsdd_digits/{digit}.wav").write_bytes(sound(digit))
    sounds = [{"audio": f"{d}.wav", "label": str(d), **_said("<audio>", str(d))} for d in range(8)]
    _write_records(folder / "fsdd_digits", sounds)
    lines = ["image,question,answer", "photos/17.jpg,what is it?,a mug", "photos/17.jpg,is it broken?,no"]
    for number in range(1, 9):
        for kind, colour in (("cat", "orange"), ("dog", "brown")):
            file = folder / f"my_pictures/{kind}/{number:03}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 30), colour).save(file)
            lines.append(f"{kind}/{number:03}.jpg,what is in the picture?,{kind}")
    (folder / "my_table.csv").write_text("\n".join(lines))
    syllables = [f"{a}{b}{c}" for a in "bcdfgh" for b in "aeiou" for c in "klmn"]
    words = [first + second for first in syllables for second in syllables[::3]]
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": f"{w} {w}s {w}ing"}) for w in words))


def sound(pitch: int) -> bytes:
    """A second of a tone, as a WAV file."""
    tone = np.sin(np.arange(8000) * (pitch + 2) / 20) * 8000
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(tone.astype("<i2").tobytes())
    return buffer.getvalue()


def _said(mark: str, answer: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"{mark}\nWhat is it?"}, {"from": "gpt", "value": answer}]
    return {"conversations": turns}


def _write_records(folder: Path, records: Sequence[dict[str, Any]]) -> None:
    for name in ("train", "val"):
        (folder / f"{name}.json").write_text(json.dumps(records))


if __name__ == "__main__":  # reads pages, in the folder that it is started in
    one = Reader(Path.cwd())
    for name in sys.argv[1:]:
        one.read(Path(name))
        print("read", name, flush=True)
