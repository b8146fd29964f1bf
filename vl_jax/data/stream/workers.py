"""Work done elsewhere, chunk by chunk: many small tasks would cost more to hand over than to do."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar, runtime_checkable

Task = TypeVar("Task")
TaskIn = TypeVar("TaskIn", contravariant=True)
Result = TypeVar("Result")
Tag = TypeVar("Tag")


@runtime_checkable
class Pool(Protocol[TaskIn, Result]):
    """Does chunks of tasks, several at a time."""

    def submit(self, tasks: Sequence[TaskIn], /) -> Future[list[Result]]: ...

    def close(self) -> None: ...


class Threads(Generic[Task, Result]):
    """A pool of threads of this process."""

    def __init__(self, function: Callable[[Sequence[Task]], list[Result]], count: int):
        """Takes what to do with a chunk."""
        self._function = function
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="data")

    def submit(self, tasks: Sequence[Task]) -> Future[list[Result]]:
        """Starts on a chunk when a thread is free."""
        return self._pool.submit(self._function, tasks)

    def close(self) -> None:
        """Waits for what has begun."""
        self._pool.shutdown()


class Here(Generic[Task, Result]):
    """No pool: the thread that asks for the result of a chunk does it.

    A thread of a pool and the one that lays out batches wait for each other at Python's lock: small pictures
    take a third less CPU time without the pool.
    """

    def __init__(self, function: Callable[[Sequence[Task]], list[Result]]):
        """Takes what to do with a chunk."""
        self._function = function

    def submit(self, tasks: Sequence[Task]) -> Future[list[Result]]:
        """Notes a chunk."""
        return _Later(lambda: self._function(tasks))

    def close(self) -> None:
        """There is nothing to wait for."""


class _Later(Future[list[Result]]):
    """What is done when it is asked for."""

    def __init__(self, work: Callable[[], list[Result]]):
        super().__init__()
        self._work = work

    def result(self, timeout: float | None = None) -> list[Result]:
        return self._work()


def in_order(
    pool: Pool[Task, Result], chunks: Iterator[tuple[Tag, Sequence[Task]]], *, ahead: int
) -> Iterator[tuple[Tag, list[Result]]]:
    """The results of each chunk with its tag, in order, while that many later chunks are being worked on.

    Raises:
      Whatever a task raised.
    """
    pending: deque[tuple[Tag, Future[list[Result]]]] = deque()
    with contextlib.closing(pool):
        try:
            for tag, tasks in chunks:
                pending.append((tag, pool.submit(tasks)))
                if len(pending) > ahead:
                    tag, future = pending.popleft()
                    yield tag, future.result()
        finally:
            for _, future in pending:
                future.cancel()
