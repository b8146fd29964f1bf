"""Processes meet before jax starts, at the port that jax takes after them.

    all but the first --hello--> first        who they are, and what they run
                      <--waiting for 3, 5--   every second, until all have come
                      <--all hellos---------  or why the job cannot begin: the same line everywhere

jax itself waits without a word, and ends a process whose peer does not come with a stack of its own.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import queue
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vl_jax.runtime.hosts.cluster import Cluster

_BEAT = 1.0  # seconds between two words to those who wait
_GLANCE = 0.3
_LATE = 3.0
_LONGEST = 1 << 20  # bytes of a line

Hello = dict[str, Any]


class Missing(ValueError):
    """Processes that have not come, or do not come any more; the message names them."""


def meet(cluster: Cluster, facts: Mapping[str, str], *, within: float) -> list[Hello]:
    """What each process says of itself, by number, when all have come.

    Args:
      facts: what has to be the same in all of them, such as versions.
      within: seconds that this process waits.

    Raises:
      Missing: not all came.
      ValueError: facts differ, or two processes have one number; the same line in all processes.
    """
    hello = {
        "number": cluster.number,
        "count": cluster.count,
        "host": socket.gethostname(),
        "process": os.getpid(),
        "facts": dict(facts),
    }
    until = time.monotonic() + within
    return (
        _receive(cluster, hello, until, within)
        if cluster.number == 0
        else _visit(cluster, hello, until, within)
    )


def odd_one(values: Sequence[str], names: Sequence[str]) -> str | None:
    """Who says something else than most, in words; None if all say the same.

    Where as many say one thing as another, the first process is right.
    """
    if len(set(values)) < 2:
        return None
    usual = max(values, key=lambda value: (values.count(value), value == values[0]))
    odd = [number for number, value in enumerate(values) if value != usual]
    other = next(number for number, value in enumerate(values) if value == usual)
    rest = names[other] if len(values) == 2 else f"{len(values) - len(odd)} of {len(values)} processes"
    more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
    return f"{names[odd[0]]}{more}: {values[odd[0]]}; {rest}: {usual}"


def _receive(cluster: Cluster, mine: Hello, until: float, within: float) -> list[Hello]:
    """The first process: collects all, and tells all how it ended."""
    came: queue.Queue[tuple[Hello, _Line]] = queue.Queue()
    known: dict[int, tuple[Hello, _Line | None]] = {0: (mine, None)}
    lines: list[_Line] = []
    problem, spoken = "", 0.0
    with _listening(cluster, until) as server, contextlib.ExitStack() as stack:
        while not problem and len(known) < cluster.count:
            missing = [number for number in range(cluster.count) if number not in known]
            if time.monotonic() > until:
                problem = _absent(cluster, missing, within)
                break
            if time.monotonic() - spoken > _BEAT:
                spoken = time.monotonic()
                for number in [n for n, (_, line) in known.items() if line and not line.say(waiting=missing)]:
                    del known[number]  # It has gone, and may come again.
            with contextlib.suppress(TimeoutError):
                line = stack.enter_context(contextlib.closing(_Line(server.accept()[0])))
                threading.Thread(target=_greet, args=(line, came), daemon=True).start()
            with contextlib.suppress(queue.Empty):
                while not problem:
                    hello, line = came.get_nowait()
                    lines.append(line)
                    problem = _contradiction(cluster, hello, known)
                    known.setdefault(hello["number"], (hello, line))
        hellos = [known[number][0] for number in sorted(known)]
        problem = problem or _difference(hellos)
        kind = "missing" if problem and time.monotonic() > until else "refused"
        told = {kind: problem} if problem else {"hellos": hellos}
        for line in lines:
            line.say(**told)
        if kind == "missing":  # Whoever has just come hears it too.
            _tell_late(server, told)
    if problem:
        raise (Missing if kind == "missing" else ValueError)(problem)
    return hellos


def _visit(cluster: Cluster, mine: Hello, until: float, within: float) -> list[Hello]:
    """Any other process: says hello to the first until it answers, and waits for its word."""
    host, port = cluster.address.rsplit(":", 1)
    waiting: list[int] = [0]
    reason = ""
    while time.monotonic() < until:
        try:
            with contextlib.closing(_Line(socket.create_connection((host, int(port)), timeout=5.0))) as line:
                line.say(**mine)
                while time.monotonic() < until + _LATE:  # The first may have begun a little later.
                    heard = line.hear(5 * _BEAT)
                    if "hellos" in heard:
                        return heard["hellos"]
                    if problem := heard.get("missing"):
                        raise Missing(problem)
                    if problem := heard.get("refused"):
                        raise ValueError(problem)
                    waiting = heard["waiting"]
        except (OSError, KeyError) as error:  # not there yet, or something else is
            waiting, reason = [0], f" at {cluster.address} ({' '.join(str(error).split()) or 'no answer'})"
            time.sleep(_GLANCE)
    raise Missing(_absent(cluster, waiting, within, reason if waiting == [0] else ""))


def _greet(line: _Line, came: queue.Queue[tuple[Hello, _Line]]) -> None:
    """Reads the hello of whoever has come; what says something else is no process of ours."""
    with contextlib.suppress(OSError):
        hello = line.hear(5.0)
        if isinstance(hello.get("number"), int) and "facts" in hello:
            came.put((hello, line))


def _absent(cluster: Cluster, missing: Sequence[int], within: float, where: str = "") -> str:
    names = ", ".join(cluster.who(number) for number in missing[:8])
    more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
    verb = "has" if len(missing) == 1 else "have"
    return (
        f"{names}{more} of {cluster.count} {verb} not come within {within:g} s{where}: start the same "
        f"command on every host ({cluster.source} says how many there are; --join-within sets the seconds)"
    )


def _contradiction(cluster: Cluster, hello: Hello, known: Mapping[int, tuple[Hello, Any]]) -> str:
    who = f"process {hello['number']} (host {hello['host']}, pid {hello['process']})"
    if hello["count"] != cluster.count:
        return f"{who} was told of {hello['count']} processes, process 0 of {cluster.count}"
    if hello["number"] in known:
        other = known[hello["number"]][0]
        place = f"host {other['host']}, pid {other['process']}"
        return f"{who} has the number of another process ({place}); end the one that is left from before"
    return ""


def _tell_late(server: socket.socket, told: dict[str, Any]) -> None:
    until = time.monotonic() + _LATE
    while time.monotonic() < until:
        with contextlib.suppress(OSError), contextlib.closing(_Line(server.accept()[0])) as line:
            line.say(**told)
            line.hear(_GLANCE)  # What it has sent would else take the answer with it.


def _difference(hellos: Sequence[Hello]) -> str:
    """The first fact that differs; empty if none does."""
    names = [f"process {hello['number']} (host {hello['host']})" for hello in hellos]
    for fact in hellos[0]["facts"]:
        values = [f"{fact} {hello['facts'].get(fact, 'absent')}" for hello in hellos]
        if (odd := odd_one(values, names)) is not None:
            return f"hosts differ: {odd}; install the same on every host"
    return ""


@contextlib.contextmanager
def _listening(cluster: Cluster, until: float) -> Iterator[socket.socket]:
    """The port of the first process, which an earlier run may still be leaving."""
    port, both = int(cluster.address.rsplit(":", 1)[1]), socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    while True:
        try:
            server = socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=512)
            break
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            if time.monotonic() > until:
                raise ValueError(
                    f"port {port} of this host is in use: end the run that has it, or set another with "
                    "JAX_COORDINATOR_PORT"
                ) from None
            time.sleep(_GLANCE)
    with server:
        server.settimeout(_GLANCE)
        yield server


class _Line:
    """A connection on which each line is a JSON object."""

    def __init__(self, connection: socket.socket):
        self._connection, self._read = connection, b""

    def say(self, **what: Any) -> bool:
        """Whether it went out."""
        try:
            self._connection.settimeout(5.0)
            self._connection.sendall(json.dumps(what).encode() + b"\n")
        except OSError:
            return False
        return True

    def hear(self, seconds: float) -> dict[str, Any]:
        """The next line.

        Raises:
          OSError: there is none in that time, or it is no object.
        """
        until = time.monotonic() + seconds
        while b"\n" not in self._read:
            self._connection.settimeout(max(0.01, until - time.monotonic()))
            piece = self._connection.recv(1 << 16)
            if not piece or len(self._read) > _LONGEST:
                raise OSError("the connection ended")
            self._read += piece
        line, _, self._read = self._read.partition(b"\n")
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise OSError("something else answers there")
        return found

    def close(self) -> None:
        self._connection.close()
