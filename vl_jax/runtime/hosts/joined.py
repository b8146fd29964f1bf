"""Processes that have joined: they compare what has to be the same, and none ends without telling the others.

Everything goes through the key-value store of jax's coordination service, which the first process holds.
Every wait has a bound.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils

from vl_jax.runtime.hosts import log
from vl_jax.runtime.hosts.cluster import Cluster
from vl_jax.runtime.hosts.pulse import LOST, Pulse
from vl_jax.runtime.hosts.rendezvous import Missing, meet, odd_one

COMPARING = 300.0  # seconds that a process may be behind another where facts are compared
_ENDING = 600.0  # seconds that the first process may write reports while the others are done
_JAX_SILENT = 3600  # seconds after which jax would end a process; pulses do so before
_SIGNAL = "vl_jax/signal"
_SHOWN = 3  # differences that a message names
_ABSENT = "absent"


class Hosts:
    """The processes of this job, seen from one of them."""

    def __init__(self, cluster: Cluster, names: list[str], client: Any):
        """Takes the names of all processes, and jax's client of the coordination service."""
        self.number, self.count, self.names = cluster.number, cluster.count, names
        self._cluster, self._client = cluster, client
        self.pulse = Pulse(client, cluster.number, names, self._leave)
        self._ending = threading.Lock()
        self._asked: Counter[str] = Counter()

    def gather(self, name: str, value: str, *, within: float) -> list[str]:
        """What every process says under a name; all processes ask under the same names in the same order.

        Raises:
          Missing: not all have said it in that time.
        """
        self._asked[name] += 1
        store, until = self._client, time.monotonic() + within
        key = f"vl_jax/said/{self._asked[name]}/{name}"
        store.key_value_set(f"{key}/{self.number}", value)
        if self.number:
            try:
                found = json.loads(store.blocking_key_value_get(f"{key}.all", round(1000 * (within + 10))))
            except jax.errors.JaxRuntimeError:
                raise Missing(f"{self.names[0]} has not come to {name!r} within {within:g} s") from None
        else:
            said: dict[int, str] = {}
            while len(said) < self.count and time.monotonic() < until:
                said = {
                    int(path.rpartition("/")[2]): text for path, text in store.key_value_dir_get(key + "/")
                }
                time.sleep(0 if len(said) == self.count else 0.05)
            found: list[Any] = [said.get(number) for number in range(self.count)]
            store.key_value_set(f"{key}.all", json.dumps(found))
        if absent := [self.names[number] for number, text in enumerate(found) if text is None]:
            raise Missing(f"{', '.join(absent[:8])}: not come to {name!r} within {within:g} s")
        return list(found)

    def same(self, name: str, facts: Mapping[str, Any], remedy: str) -> None:
        """Makes sure that facts, by their path, are the same in every process.

        Raises:
          ValueError: they are not; all processes raise the same line, which names the one that differs.
        """
        mine = {path: json.dumps(value, ensure_ascii=False) for path, value in facts.items()}
        lead = json.dumps(mine) if self.number == 0 else ""
        first = json.loads(self.gather(name, lead, within=COMPARING)[0])
        paths = [path for path in [*first, *(mine.keys() - first)] if first.get(path) != mine.get(path)]
        own = {path: mine.get(path, _ABSENT) for path in paths[:_SHOWN]}
        others = [
            json.loads(text) for text in self.gather(f"{name} differences", json.dumps(own), within=COMPARING)
        ]
        problems = []
        for path in dict.fromkeys(path for other in others for path in other):
            values = [f"{path} is {_short(other.get(path, first.get(path, _ABSENT)))}" for other in others]
            problems += filter(None, [odd_one(values, self.names)])
        if problems:
            raise ValueError(f"hosts differ: {'; '.join(problems[:_SHOWN])}; {remedy}")

    def ask(self, number: int) -> None:
        """Says by which signal this process was asked to stop; the first that says so counts."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(_SIGNAL, str(number))

    def asked_to_stop(self, step: int) -> int | None:
        """The signal that asks all processes to stop after this step, if any.

        jax agrees on the step: the first that none of them has begun.
        """
        if not multihost_utils.reached_preemption_sync_point(step):
            return None
        try:
            return int(self._client.key_value_try_get(_SIGNAL))
        except jax.errors.JaxRuntimeError:  # nobody has said another
            return int(signal.SIGTERM)

    def fail(self, line: str, status: int) -> None:
        """Tells the others why this process ends, and lets them go first if it is the one they talk through.

        If another one told of its end before, this one ends here.
        """
        self.pulse.tell(f"{self.names[self.number]} ended: {line}", status)
        self.pulse.let_go()

    def lost(self) -> None:
        """Waits until it would be known that another process is gone, of which this one then ends."""
        self.pulse.wait_for_news()
        with self._ending:  # If it is known, this process is about to end; nobody says another reason.
            return

    def part(self) -> None:
        """The end of a command in all processes: none is gone before the last is done."""
        try:
            self.gather("done", "", within=_ENDING)
        finally:
            self.pulse.stop()
        jax.distributed.shutdown()

    def _leave(self, line: str, status: int) -> None:
        """Ends this process at once, with one line."""
        with self._ending:  # for ever: whoever comes second is gone with the first
            log.say(f"error: {line}")
            self.pulse.let_go()
            end_at_once(status)


_joined: Hosts | None = None


def joined() -> Hosts | None:
    """The hosts that this process has joined; None if it is alone."""
    return _joined


def join(cluster: Cluster, facts: Mapping[str, str], *, within: float) -> Hosts:
    """Joins the processes of a job, before jax has begun.

    Args:
      facts: what has to be the same in all of them.
      within: seconds that they wait for each other.

    Raises:
      Missing: some have not come; the message names them.
      ValueError: they differ.
    """
    global _joined
    hellos = meet(cluster, facts, within=within)
    jax.distributed.initialize(
        cluster.address,
        cluster.count,
        cluster.number,
        local_device_ids=cluster.devices,
        cluster_detection_method="deactivate",
        initialization_timeout=max(60, round(within)),
        heartbeat_timeout_seconds=_JAX_SILENT,
    )
    from jax._src.distributed import global_state  # jax offers its store nowhere else

    names = [cluster.who(number, {number: hello["host"]}) for number, hello in enumerate(hellos)]
    _joined = Hosts(cluster, names, global_state.client)
    _on_abort(cluster, _joined)
    _joined.pulse.start()
    return _joined


def end_at_once(status: int) -> None:
    """Ends the process without asking anybody: the others are gone, or have been told."""
    for child in multiprocessing.active_children():  # one that is stopped would stay for ever
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(status)


def _on_abort(cluster: Cluster, hosts: Hosts) -> None:
    """Says in one line why, where jax's client ends the process because the first one is gone.

    It does so by ``abort`` in a thread of its own, and takes no function of ours for it.
    """

    def aborted(_: int) -> None:
        host, port = cluster.address.rsplit(":", 1)
        try:
            socket.create_connection((host, int(port)), timeout=2.0).close()
        except OSError:
            hosts.pulse.stop_soon()
            log.say(f"error: {hosts.names[0]} is gone, and with it what all processes talk through{_GO_ON}")
            end_at_once(LOST)
        log.say(f"error: the process was ended by its own libraries{log.where()}")

    global _kept
    _kept = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
    library = ctypes.CDLL(None)
    library.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    library.signal.restype = ctypes.c_void_p
    library.signal(int(signal.SIGABRT), ctypes.cast(_kept, ctypes.c_void_p))


_GO_ON = "; the run goes on from its last checkpoint when it is launched again"
_kept: Any = None  # the handler, for as long as the process lives


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
