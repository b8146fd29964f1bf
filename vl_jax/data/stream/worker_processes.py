"""Worker processes: tasks go through a pipe, arrays come back through shared memory.

    this process                               worker, without JAX
    thread of a worker --tasks--> pipe ------> reads, decodes, encodes
        views of a copy <====== arrays ======  shared memory
                        <-------- pipe ------- what is not an array

Nothing is left behind, whoever dies and however: the memory loses its name as soon as its worker has opened
it, and a worker ends when its pipe does.
"""

from __future__ import annotations

import contextlib
import gc
import math
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext
from multiprocessing.shared_memory import SharedMemory
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from vl_jax.data.example import Example
from vl_jax.data.sample import BadSample
from vl_jax.data.stream.background import DataFailure
from vl_jax.parts import Portable

Task = TypeVar("Task")
Read = Callable[[Sequence[Task]], list[Example | BadSample]]

_SHARED = "/dev/shm"  # where Linux keeps shared memory; often small in a container
_ARRAYS = {name: np.dtype(np.int32) for name in ("tokens", "targets", "positions", "branch_ids")}
_ARRAYS |= {name: np.dtype(np.int32) for name in ("visual_slot", "visual_index", "visual_start")}
_ARRAYS |= {"loss_weights": np.dtype(np.float32), "tiles": np.dtype(np.uint8)}
_PIPED = ("id", "num_turns", "grids", "answer_runs", "media", "labels")  # what is left of an example
_ALIGNED = 8  # bytes
_GLANCE = 0.5  # seconds between looks at whether an answer is still wanted
_PATIENCE = 5.0  # seconds that a worker may take for an answer that is not


class _Packed(NamedTuple):
    """An example whose arrays are in shared memory."""

    id: str
    num_turns: int
    grids: tuple[tuple[int, int], ...]
    answer_runs: tuple[range, ...]
    start: int
    shapes: tuple[tuple[int, ...], ...]  # of the arrays, one behind the other
    media: Mapping[str, np.ndarray]  # these come through the pipe
    labels: Mapping[str, np.ndarray]


class Processes(Generic[Task]):
    """A pool of worker processes; for what it does see ``workers.Threads``."""

    def __init__(
        self, make: Callable[[], Read[Task]], count: int, *, room: int, stop: threading.Event | None = None
    ):
        """Starts the workers.

        Args:
          make: called in every worker, gives what to do with a chunk. Has to be picklable.
          room: bytes of shared memory of each; examples beyond it come through the pipe, which is slower.
          stop: once it is set, a worker that does not answer is killed.

        Raises:
          ValueError: there is not so much shared memory.
        """
        _check_room(count, room)
        context = multiprocessing.get_context("spawn")  # a copy of a process with threads may hang
        stop = stop or threading.Event()
        self._workers = [_Worker(context, make, room, stop) for _ in range(count)]
        self._free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._free.put(worker)
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="data")

    def submit(self, tasks: Sequence[Task]) -> Future[list[Example | BadSample]]:
        """Starts on a chunk when a worker is free."""
        return self._pool.submit(self._do, tasks)

    def close(self) -> None:
        """Waits for what has begun, and for the end of the workers."""
        self._pool.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.hang_up()
        for worker in self._workers:
            worker.end()

    def _do(self, tasks: Sequence[Task]) -> list[Example | BadSample]:
        worker = self._free.get_nowait()  # There are as many as threads.
        try:
            return worker.do(tasks)
        finally:
            self._free.put(worker)


class _Worker:
    """One worker process as seen from here."""

    def __init__(self, context: SpawnContext, make: Callable, room: int, stop: threading.Event):
        self._stop = stop
        self._memory, self._named = SharedMemory(create=True, size=room), True
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, Portable(make), self._memory.name)
        self._process = context.Process(target=_serve, args=arguments, name="data worker", daemon=True)
        self._process.start()
        theirs.close()  # So that reading fails when the worker is dead.

    def do(self, tasks: Sequence[Task]) -> list[Example | BadSample]:
        """The results of a chunk.

        Raises:
          ChildProcessError: the worker has died.
          ValueError, OSError: what was raised there.
        """
        try:
            if self._named:
                self._answer()  # It has opened the memory.
                self._forget_name()
            self._pipe.send(tasks)
            answer = self._answer()
        except (EOFError, OSError):
            raise ChildProcessError(self._death()) from None
        if isinstance(answer, Exception):
            raise answer
        results, used = answer
        data = np.array(np.frombuffer(_buffer(self._memory), np.uint8, used))  # the next chunk may come now
        return [_unpack(result, data) if isinstance(result, _Packed) else result for result in results]

    def _answer(self) -> Any:
        """What comes through the pipe; a worker that is stuck is killed when nobody waits for it any more."""
        unwanted = 0.0
        while not self._pipe.poll(_GLANCE):
            unwanted = unwanted + _GLANCE if self._stop.is_set() else 0.0
            if unwanted >= _PATIENCE:
                self._process.kill()
        return self._pipe.recv()

    def hang_up(self) -> None:
        """Lets the worker end."""
        self._pipe.close()

    def end(self) -> None:
        """Waits for the worker's end, and frees its memory."""
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(timeout=_PATIENCE)
        self._forget_name()
        self._memory.close()

    def _forget_name(self) -> None:
        if self._named:
            self._named = False
            self._memory.unlink()

    def _death(self) -> str:
        self._process.join(timeout=5)
        code = self._process.exitcode
        how = f"exit status {code}"
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                how = signal.Signals(-code).name
        which = f"a data worker (process {self._process.pid})"
        return f"{which} died: {how}; loading.num_workers=0 reads without them"


def _check_room(count: int, room: int) -> None:
    if os.path.isdir(_SHARED):
        state = os.statvfs(_SHARED)
        free = state.f_bavail * state.f_frsize
        if free < count * room:
            raise ValueError(
                f"loading.num_workers={count}: needs {count * room >> 20} MiB of shared memory, {_SHARED} "
                f"has {free >> 20} MiB (a container takes --shm-size)"
            )


def _serve(pipe: Connection, make: Portable[Callable[[], Read[Task]]], memory_name: str) -> None:
    """What a worker does until its pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process decides when to stop
    memory = SharedMemory(memory_name)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        pipe.send(None)
        read: Read[Task] | None = None
        while True:
            tasks = pipe.recv()
            try:
                if read is None:
                    read = make.value()
                    gc.freeze()  # What is here now stays; there is no need to look through it.
                answer = _pack(read(tasks), _buffer(memory))
            except (ValueError, OSError) as error:
                answer = error
            except Exception as error:
                answer = RuntimeError(f"in a data worker: {type(error).__name__}: {error}")
            except BaseException as error:  # such as the panic of a library
                answer = DataFailure.of(error, "in a data worker")
            pipe.send(answer)


def _buffer(memory: SharedMemory) -> memoryview:
    assert memory.buf is not None  # It is open.
    return memory.buf


def _pack(
    results: list[Example | BadSample], memory: memoryview
) -> tuple[list[_Packed | Example | BadSample], int]:
    """The results with their arrays moved to the memory as far as they fit, and how much of it is used."""
    packed: list[_Packed | Example | BadSample] = []
    used = 0
    for result in results:
        if not isinstance(result, Example) or used + _bytes_of(result) > len(memory):
            packed.append(result)
            continue
        start, shapes = used, []
        for name, dtype in _ARRAYS.items():
            array = getattr(result, name)
            place = np.frombuffer(memory, dtype, array.size, used)
            place[:] = array.reshape(-1)
            shapes.append(array.shape)
            used += array.nbytes
        used = -(-used // _ALIGNED) * _ALIGNED
        kept = {name: getattr(result, name) for name in _PIPED}
        packed.append(_Packed(**kept, start=start, shapes=tuple(shapes)))
    return packed, used


def _bytes_of(example: Example) -> int:
    return sum(getattr(example, name).nbytes for name in _ARRAYS) + _ALIGNED


def _unpack(packed: _Packed, data: np.ndarray) -> Example:
    arrays, stop = {}, packed.start
    for (name, dtype), shape in zip(_ARRAYS.items(), packed.shapes, strict=True):
        start, stop = stop, stop + math.prod(shape) * dtype.itemsize
        arrays[name] = data[start:stop].view(dtype).reshape(shape)
    return Example(**{name: getattr(packed, name) for name in _PIPED}, **arrays)
