"""A process that trains ``chaos_experiment.py`` and comes to harm; ``chaos.py`` starts it by fork.

What is imported here is imported once, in the server that forks, and not for every process.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
import resource
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import grain  # noqa: F401  loaded early, as are those below
import jax
import orbax.checkpoint  # noqa: F401
import tensorboardX  # noqa: F401

import vl_jax.commands.train
import vl_jax.runs  # noqa: F401
from vl_jax import cli
from vl_jax.data.stream.pipeline import TrainIterator
from vl_jax.runtime.hosts.joined import end_at_once, joined

EXPERIMENT = Path(__file__).with_name("chaos_experiment.py")
# A worker process, and a watchdog that soon sees that nothing moves.
_IMPATIENT = (
    "data.loading.num_workers=1",
    "loop.watchdog.warn_after=0",
    "loop.watchdog.end_after=5",
    "loop.watchdog.compile_allowance=30",
)
SERVER = __name__  # what the server that forks imports first


@dataclasses.dataclass(frozen=True)
class Harm:
    """What happens to a process from inside; what comes from outside is not here."""

    seed: int = 0
    kill_at_change: int = 0  # SIGKILL before this change of the workdir's names (open, rename, ...); 0: none
    file_limit: int = -1  # no file may become longer than so many bytes, as on a full disk; -1: any may
    clock_jumps: bool = False  # the time of day is another one, by years, again and again
    stop_worker: int = 0  # SIGSTOP to the process that reads data, after so many batches; 0: there is none
    devices: int = 1  # and what belongs to no harm: how many devices, and which process this is of how many
    options: tuple[str, ...] = ()  # more overrides
    address: str = ""
    processes: int = 1
    number: int = 0


def run(workdir: str, cache: str, output: Connection, harm: Harm) -> None:
    """Trains in a folder; all that is printed goes to ``output``."""
    for number in (1, 2):
        os.dup2(output.fileno(), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    _use(cache, harm.devices)
    if harm.kill_at_change:
        _kill_at_change(workdir, harm.kill_at_change)
    if harm.file_limit >= 0:
        _limit(harm)
    if harm.clock_jumps:
        _let_jump(random.Random(harm.seed))
    options = [f"--config={EXPERIMENT}", f"--workdir={workdir}", *harm.options]
    if harm.stop_worker:
        _stop_worker(harm.stop_worker)
        options += [f"--config.{path}" for path in _IMPATIENT]
    if harm.processes > 1:
        which = f"--processes={harm.processes}", f"--process={harm.number}"
        options += [f"--coordinator={harm.address}", *which, "--config.loop.watchdog.silent_after=10"]
    status = cli.main(["train", *options])
    sys.stdout.flush()
    if joined() is not None:
        end_at_once(status)
    sys.exit(status)


def _use(cache: str, devices: int) -> None:
    """A few devices, quickly compiled, from a cache: before jax begins."""
    flags = "--xla_backend_optimization_level=0"
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}"
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_numpy_dtype_promotion", "strict")


def _stop_worker(batches: int) -> None:
    """Once so many batches have been read, the process that reads them is stopped, and stays."""
    read, left = TrainIterator.__next__, [batches]

    def counted(stream: TrainIterator) -> object:
        left[0] -= 1
        if left[0] == 0:
            for child in multiprocessing.active_children():
                os.kill(child.pid or 0, signal.SIGSTOP)
        return read(stream)

    TrainIterator.__next__ = counted


def _kill_at_change(workdir: str, last: int) -> None:
    done = 0

    def look(event: str, arguments: tuple) -> None:
        nonlocal done
        if event == "open":
            changes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        else:
            changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
        if changes and str(arguments[0]).startswith(workdir):
            done += 1
            if done == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)


def _limit(harm: Harm) -> None:
    """After a moment no file becomes longer: a write takes a part, and the next one fails."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    delay = random.Random(harm.seed).choice([0.0, 0.0, 10.0, 20.0])
    timer = threading.Timer(delay, resource.setrlimit, (resource.RLIMIT_FSIZE, (harm.file_limit, most)))
    timer.daemon = True
    timer.start()


def _let_jump(chance: random.Random) -> None:
    real, state = time.time, {"ahead": 0.0}

    def jumping() -> float:
        if chance.random() < 0.02:
            state["ahead"] = chance.choice([0.0, 3600.0, -3600.0, 1e8, -1e8])
        return real() + state["ahead"]

    time.time = jumping
    time.time_ns = lambda: int(jumping() * 1e9)
