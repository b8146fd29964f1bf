"""Whatever happens to a run, and whenever: it goes on, and ends as the run that nothing happened to.

``VL_JAX_CHAOS=30`` says how many blows there are, ``VL_JAX_CHAOS_SEED=1`` which.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import chaos_process
import jax
import pytest
from chaos_process import Harm
from PIL import Image as PilImage

from vl_jax.checkpoint import CHECKPOINTS, DAMAGED, Checkpointer
from vl_jax.metrics import METRICS_FILE, read_metrics, without_timings
from vl_jax.runtime import lock

pytestmark = pytest.mark.slow
BLOWS, SEED = int(os.environ.get("VL_JAX_CHAOS", "4")), os.environ.get("VL_JAX_CHAOS_SEED", "0")
PATIENCE = 900.0  # seconds; whoever takes longer waits for ever
STEPS = 20
UNHARMED = Harm()
KINDS = ("kill", "kill at a change", "ask", "full disk", "damage", "clock", "second")


class Running:
    """A process that trains, and what it prints."""

    def __init__(self, workdir: Path, cache: Path, harm: Harm = UNHARMED):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([chaos_process.SERVER])
        reader, writer = context.Pipe(duplex=False)
        arguments = (str(workdir), str(cache), writer, harm)
        self.process = context.Process(target=chaos_process.run, args=arguments)
        self.process.start()
        writer.close()
        self._reader, self._said = reader, bytearray()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        while piece := os.read(self._reader.fileno(), 1 << 16):
            self._said += piece

    def ends(self) -> tuple[int, str]:
        """Exit status and output, once it has ended."""
        self.process.join(PATIENCE)
        if waits := self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        self._thread.join()
        self._reader.close()
        said = self._said.decode(errors="replace")
        assert not waits, f"still there after {PATIENCE} s:\n{said}"
        assert "Traceback" not in said and "is a fault of" not in said, said
        return self.process.exitcode or 0, said

    def reaches(self, workdir: Path, lines: int) -> None:
        """Returns when the log has so many lines, or the process has ended."""
        end = time.monotonic() + PATIENCE
        while self.process.is_alive() and len(read_metrics(workdir / METRICS_FILE)) < lines:
            assert time.monotonic() < end
            time.sleep(0.01)


def write_pictures(folder: Path) -> Path:
    folder.mkdir()
    for name, count in (("train", 11), ("held_out", 4)):
        rows = [("id", "image", "label")]
        for i in range(count):
            PilImage.new("RGB", (8, 8), (i * 20,) * 3).save(folder / f"{name}{i}.png")
            rows.append((f"{name}{i}", f"{name}{i}.png", "light" if i > 5 else "dark"))
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    return folder


def end_of(workdir: Path) -> dict:
    """All that a run ends with: its log, its last state bit for bit, its scores, its files."""
    checkpointer = Checkpointer(workdir / CHECKPOINTS, lazy=True)
    restored = checkpointer.restore_stored(("step", "optimizer", "routing"))
    checkpointer.close()
    assert restored is not None and restored[0] == STEPS
    leaves = jax.tree.leaves(restored[1:3])
    arrays = [(x.dtype, x.shape, [x[i].tobytes() for i in x.pieces()]) for x in leaves]
    position = restored[3]["position"]
    names = [p.relative_to(workdir) for p in sorted(workdir.rglob("*")) if p.is_file()]
    # Which checkpoints stay beside the last one depends on where the run was stopped.
    left = {"tensorboard", "logs", CHECKPOINTS}
    return {
        "log": [without_timings(line) for line in read_metrics(workdir / METRICS_FILE)],
        "arrays": arrays,
        "position": {**position, "line": without_timings(position["line"])},
        "checksums": restored[3]["leaves"],
        "files": {str(name) for name in names if not left & {*name.parts}},
        **{n.name: (workdir / n).read_text() for n in names if n.parent.parent.name == "eval"},
        "best": (workdir / "best.json").read_text(),
    }


def check_left(workdir: Path) -> None:
    """What every process leaves, however it ended: no lock, no line twice, no file half written."""
    if not workdir.exists():
        return
    with lock.held(workdir):
        pass
    steps = [line["step"] for line in read_metrics(workdir / METRICS_FILE)]
    assert steps == list(range(1, len(steps) + 1))
    for file in [*workdir.glob("*.json"), *workdir.glob("eval/*/*.json")]:
        json.loads(file.read_text())


def saved_steps(workdir: Path) -> list[int]:
    return sorted(int(p.name) for p in workdir.glob(f"{CHECKPOINTS}/*") if p.name.isdigit())


def damage(workdir: Path, chance: random.Random) -> bool:
    """Harms one to three files of the newest of several checkpoints."""
    steps = saved_steps(workdir)
    if len(steps) < 2:
        return False
    files = sorted(p for p in (workdir / CHECKPOINTS / str(steps[-1])).rglob("*") if p.is_file())
    for file in chance.sample(files, chance.randint(1, 3)):
        content, way = bytearray(file.read_bytes()), chance.randrange(4)
        if way == 0:
            file.unlink()
            continue
        at = chance.randrange(len(content) or 1)
        if way == 1:
            content = content[:at]
        elif way == 2:
            content[at : at + 1] = bytes([content[at] ^ 1 << chance.randrange(8)] if content else b"x")
        else:
            content[at : at + 64] = chance.randbytes(64)
        file.write_bytes(content)
    return True


class Chaos:
    """Strikes runs in a folder, one blow after another."""

    def __init__(self, folder: Path, cache: Path):
        self.folder, self.cache, self.counts = folder, cache, Counter()

    def strike(self, workdir: Path, kind: str, chance: random.Random) -> int:
        """Starts the run, lets something happen to it; its exit status."""
        lines = len(read_metrics(workdir / METRICS_FILE))
        harm = Harm(seed=chance.randrange(1000))
        if kind == "kill at a change":
            harm = dataclasses.replace(harm, kill_at_change=chance.randint(1, 120))
        if kind == "full disk":
            harm = dataclasses.replace(harm, file_limit=chance.choice([0, 100, 700, 3000, 9000]))
        harm = dataclasses.replace(harm, clock_jumps=kind == "clock")
        running = Running(workdir, self.cache, harm)
        if kind in ("kill", "ask", "damage", "clock", "second"):
            # A signal that asks would meet a process that has not begun to run the command.
            least = int(kind == "ask")
            running.reaches(workdir, lines + chance.choice([least, 1, 1, 2, 3, 4, 5]))
            time.sleep(chance.choice([0, 0, 0.05, 0.3]) * chance.random())
        if kind == "second":
            self.refused(workdir, running)
        number = signal.SIGKILL
        if kind == "ask":
            number = chance.choice([signal.SIGTERM, signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
        if kind not in ("kill at a change", "full disk") and running.process.is_alive():
            os.kill(running.process.pid or 0, number)
        status, said = running.ends()
        self.check(workdir, kind, status, said)
        if kind == "damage" and damage(workdir, chance):
            self.counts["damaged checkpoints"] += 1
        return status

    def refused(self, workdir: Path, first: Running) -> None:
        """A second process in the same folder ends with one line, if the first one still holds it."""
        status, said = Running(workdir, self.cache).ends()
        if first.process.is_alive():
            assert status == 2 and "is in use by another run" in said.splitlines()[-1], said
            self.counts["second processes refused"] += 1

    def check(self, workdir: Path, kind: str, status: int, said: str) -> None:
        self.counts[f"{kind}: status {status}"] += 1
        with (self.folder / "blows.txt").open("a", encoding="utf-8") as file:  # for a look at a failure
            lines = len(read_metrics(workdir / METRICS_FILE))
            file.write(f"{workdir.name} {kind}: {status}, {lines} lines\n")
        last = said.strip().splitlines()[-1] if said.strip() else ""
        if status == 2:
            # A jump in the middle of a look at the clock may end a save, but not the run for good.
            assert kind in ("full disk", "clock") and last.startswith("error: "), said
            assert re.search(r"file too large|is not saved", last), last
        else:
            asked = (128 + signal.SIGTERM, 128 + signal.SIGHUP, 128 + signal.SIGINT, 130)
            early = (-signal.SIGTERM, -signal.SIGHUP)  # before the run had anything to save
            assert status in (0, -signal.SIGKILL, *asked, *early), (status, said)
        if saved := re.search(r"stopped at step (\d+) by", said):
            assert saved_steps(workdir)[-1] == int(saved[1]) and "state is saved" in said
        check_left(workdir)

    def finish(self, workdir: Path) -> None:
        status, said = Running(workdir, self.cache).ends()
        assert status == 0, said
        self.counts["checkpoints set aside"] += len([*workdir.glob(f"{CHECKPOINTS}/{DAMAGED}/*")])


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork servers")
def test_whatever_happens_a_run_goes_on_and_ends_as_if_nothing_had(tmp_path, monkeypatch, capsys):
    pytest.importorskip("ml_collections")
    pytest.importorskip("grain")
    monkeypatch.setenv("VL_JAX_CHAOS_DATA", str(write_pictures(tmp_path / "data")))
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    cache = Path(str(jax.config.jax_compilation_cache_dir)) / "chaos"
    chaos, chance, start = Chaos(tmp_path, cache), random.Random(SEED), time.monotonic()
    chaos.finish(tmp_path / "whole")
    expected = end_of(tmp_path / "whole")
    blows, rounds = 0, 0
    while blows < BLOWS:
        workdir = tmp_path / str(rounds)
        while blows < BLOWS:
            kind = KINDS[blows % len(KINDS)]
            blows, status = blows + 1, chaos.strike(workdir, kind, chance)
            if status == 0:
                break
        chaos.finish(workdir)
        found = end_of(workdir)
        for name in expected:
            assert found[name] == expected[name], (rounds, name)
        rounds += 1
        shutil.rmtree(workdir)
    with capsys.disabled():
        print(f"\n{blows} blows, {rounds} runs, {time.monotonic() - start:.0f} s: {dict(chaos.counts)}")
