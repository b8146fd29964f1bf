"""Blows to small real runs, at random times: each run goes on, and ends as the run that nothing happened to.

    python tests/chaos.py --kills=100 [--seed=1] [--kinds=kill,ask]

``test_chaos.py`` deals out fewer of them. A run has one process, or two that train together.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported, or it has no effect

import chaos_process  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
from chaos_process import Harm  # noqa: E402
from PIL import Image as PilImage  # noqa: E402

from vl_jax.checkpoint import CHECKPOINTS, DAMAGED, Checkpointer  # noqa: E402
from vl_jax.metrics import METRICS_FILE, read_metrics, without_timings  # noqa: E402
from vl_jax.runtime import lock  # noqa: E402
from vl_jax.runtime.hosts.pulse import LOST  # noqa: E402
from vl_jax.train.watchdog import EXIT_STATUS  # noqa: E402

PATIENCE = 900.0  # seconds; whoever takes longer waits for ever
STEPS = 20
UNHARMED = Harm()
# To a run of one process, and to one of two.
SINGLE = ("kill", "kill at a change", "ask", "full disk", "damage", "clock", "second", "stopped worker")
PAIR = ("kill one of two", "ask one of two", "stop one of two", "kill two")
ASKED = (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


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

    def send(self, number: int) -> None:
        """Sends a signal, if the process is still there."""
        if self.process.is_alive():
            os.kill(self.process.pid or 0, number)

    def ends(self) -> tuple[int, str]:
        """Exit status and output, once it has ended."""
        self.process.join(PATIENCE)
        if waits := self.process.exitcode is None:
            self.process.kill()
            self.process.join(PATIENCE)
        self._thread.join(PATIENCE)
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


def together(
    workdir: Path, cache: Path, *, processes: int = 2, devices: int = 1, options: tuple[str, ...] = ()
) -> list[Running]:
    """Processes that train one run."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    harm = Harm(devices=devices, address=address, processes=processes, options=options)
    return [Running(workdir, cache, dataclasses.replace(harm, number=n)) for n in range(processes)]


def write_pictures(folder: Path) -> Path:
    """What the runs learn from."""
    folder.mkdir()
    for name, count in (("train", 11), ("held_out", 4)):
        rows = [("id", "image", "label")]
        for i in range(count):
            PilImage.new("RGB", (8, 8), (i * 20,) * 3).save(folder / f"{name}{i}.png")
            rows.append((f"{name}{i}", f"{name}{i}.png", "light" if i > 5 else "dark"))
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    return folder


def final_params(workdir: Path) -> list[np.ndarray]:
    """The parameters that a run ended with."""
    checkpointer = Checkpointer(workdir / CHECKPOINTS, lazy=True)
    restored = checkpointer.restore_stored(("step",))
    checkpointer.close()
    assert restored is not None and restored[0] == STEPS
    leaves = jax.tree.leaves(restored[1])
    return [np.concatenate([np.asarray(x[i]).reshape(-1) for i in x.pieces()]) for x in leaves]


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
    """The checkpoints that are there."""
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
        """Takes where the runs are, and where compiled programs are kept."""
        self.folder, self.cache, self.counts = folder, cache, Counter()

    def strike(self, workdir: Path, kind: str, chance: random.Random) -> int:
        """Starts the run, lets something happen to it; its exit status."""
        if kind in PAIR:
            return self._strike_two(workdir, kind, chance)
        lines = len(read_metrics(workdir / METRICS_FILE))
        harm = Harm(seed=chance.randrange(1000), clock_jumps=kind == "clock")
        if kind == "kill at a change":
            harm = dataclasses.replace(harm, kill_at_change=chance.randint(1, 120))
        if kind == "full disk":
            harm = dataclasses.replace(harm, file_limit=chance.choice([0, 100, 700, 3000, 9000]))
        if kind == "stopped worker":
            harm = dataclasses.replace(harm, stop_worker=chance.randint(1, 4))
        running = Running(workdir, self.cache, harm)
        if kind in ("kill", "ask", "damage", "clock", "second"):
            # A signal that asks would meet a process that has not begun to run the command.
            least = int(kind == "ask")
            running.reaches(workdir, lines + chance.choice([least, 1, 1, 2, 3, 4, 5]))
            time.sleep(chance.choice([0, 0, 0.05, 0.3]) * chance.random())
        if kind == "second":
            self.refused(workdir, running)
        number = chance.choice(ASKED) if kind == "ask" else signal.SIGKILL
        if kind not in ("kill at a change", "full disk", "stopped worker"):
            running.send(number)
        status, said = running.ends()
        self.check(workdir, kind, status, said)
        if kind == "damage" and damage(workdir, chance):
            self.counts["damaged checkpoints"] += 1
        return status

    def _strike_two(self, workdir: Path, kind: str, chance: random.Random) -> int:
        """The same of a run of two processes; the greater of their exit statuses."""
        lines = len(read_metrics(workdir / METRICS_FILE))
        pair = together(workdir, self.cache)
        victim = chance.randrange(2)
        pair[0].reaches(workdir, lines + chance.choice([1, 1, 2, 3, 4, 5]))
        time.sleep(chance.choice([0, 0, 0.05, 0.3]) * chance.random())
        number = {"ask one of two": chance.choice(ASKED[:3]), "stop one of two": signal.SIGSTOP}.get(
            kind, signal.SIGKILL
        )
        struck = pair if kind == "kill two" else [pair[victim]]
        for running in struck:
            running.send(number)
        ends: dict[int, tuple[int, str]] = {}
        for place in (1 - victim, victim):
            if kind == "stop one of two" and place == victim:
                pair[place].send(signal.SIGKILL)
            ends[place] = pair[place].ends()
        for end in ends.values():
            self.check(workdir, kind, *end)
        if kind in ("kill one of two", "stop one of two") and ends[1 - victim][0] != 0:
            status, said = ends[1 - victim]
            assert status == LOST and f"process {victim} " in said.splitlines()[-1], said
        if kind == "ask one of two":
            assert ends[0][0] == ends[1][0], ends
        return max(abs(status) for status, _ in ends.values())

    def refused(self, workdir: Path, first: Running) -> None:
        """A second process in the same folder ends with one line, if the first one still holds it."""
        status, said = Running(workdir, self.cache).ends()
        if first.process.is_alive():
            assert status == 2 and "is in use by another run" in said.splitlines()[-1], said
            self.counts["second processes refused"] += 1

    def check(self, workdir: Path, kind: str, status: int, said: str) -> None:
        """What every process has to say and to leave, however it ended."""
        self.counts[f"{kind}: status {status}"] += 1
        with (self.folder / "blows.txt").open("a", encoding="utf-8") as file:  # for a look at a failure
            lines = len(read_metrics(workdir / METRICS_FILE))
            file.write(f"{workdir.name} {kind}: {status}, {lines} lines\n")
        last = said.strip().splitlines()[-1] if said.strip() else ""
        if status == 2:
            # A jump in the middle of a look at the clock may end a save, but not the run for good.
            assert kind in ("full disk", "clock") and last.startswith("error: "), said
            assert re.search(r"file too large|is not saved", last), last
        elif status == EXIT_STATUS:
            assert kind == "stopped worker" and "nothing has moved" in last, said
        elif status == LOST:
            assert kind in PAIR and last.startswith("error: process "), said
        else:
            asked = (128 + signal.SIGTERM, 128 + signal.SIGHUP, 128 + signal.SIGINT, 130)
            early = (-signal.SIGTERM, -signal.SIGHUP)  # before the run had anything to save
            assert status in (0, -signal.SIGKILL, *asked, *early), (status, said)
        if saved := re.search(r"stopped at step (\d+) by", said):
            assert saved_steps(workdir)[-1] == int(saved[1]) and "state is saved" in said
        check_left(workdir)

    def finish(
        self, workdir: Path, *, processes: int = 1, devices: int = 1, options: tuple[str, ...] = ()
    ) -> None:
        """Launches the run until it is done; nothing happens to it."""
        if processes == 1:
            launched = [Running(workdir, self.cache, Harm(devices=devices, options=options))]
        else:
            launched = together(workdir, self.cache, processes=processes, devices=devices, options=options)
        ends = [running.ends() for running in launched]
        assert all(status == 0 for status, _ in ends), ends
        self.counts["checkpoints set aside"] += len([*workdir.glob(f"{CHECKPOINTS}/{DAMAGED}/*")])


def deal(
    folder: Path,
    cache: Path,
    *,
    blows: int,
    seed: str,
    kinds: Sequence[str],
    tell: Callable[[str], None] = print,
) -> None:
    """Deals out so many blows; every run that is struck ends as the whole one, bit for bit.

    Raises:
      AssertionError: one does not, or what a process said or left is not right.
    """
    chaos, chance, start = Chaos(folder, cache), random.Random(seed), time.monotonic()
    given = rounds = 0
    for names, processes in ((SINGLE, 1), (PAIR, 2)):
        chosen = [kind for kind in names if kind in kinds]
        share = blows * len(chosen) // len(kinds)
        if not share:
            continue
        whole = folder / f"whole{processes}"
        chaos.finish(whole, processes=processes)
        expected, until = end_of(whole), given + share
        while given < until:
            workdir = folder / str(rounds)
            while given < until:
                kind = chosen[given % len(chosen)]
                given, status = given + 1, chaos.strike(workdir, kind, chance)
                if status == 0:
                    break
            chaos.finish(workdir, processes=processes)
            found = end_of(workdir)
            for name in expected:
                assert found[name] == expected[name], (rounds, name)
            rounds += 1
            shutil.rmtree(workdir)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    tell(
        f"{given} blows, {rounds} runs, {time.monotonic() - start:.0f} s, "
        f"{used.ru_utime + used.ru_stime:.0f} CPU-seconds of children waited for: {dict(chaos.counts)}"
    )


def main() -> None:
    """Deals out blows by hand."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--kinds", default=",".join(SINGLE + PAIR))
    options = parser.parse_args()
    root = Path(__file__).resolve().parent
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(root), str(root.parent), os.environ.get("PYTHONPATH", "")]
    )
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory(prefix="chaos_") as name:
        folder = Path(name)
        os.environ["VL_JAX_CHAOS_DATA"] = str(write_pictures(folder / "data"))
        kinds = options.kinds.split(",")
        deal(folder, folder / "cache", blows=options.kills, seed=options.seed, kinds=kinds)


if __name__ == "__main__":
    sys.exit(main())
