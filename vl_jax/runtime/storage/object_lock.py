"""A lock in a bucket. No object store keeps one: its holder renews an object, and who finds it old takes it.

    {"holder": "process 12 on host-3", "token": "5f2c...", "count": 41}

Nobody compares clocks. Whoever comes later watches the object for longer than two renewals: if it changes,
its holder lives; if not, the holder is dead, and the run is taken over.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from vl_jax.runtime.storage import buckets

RENEWED_S = 15.0
_WATCHED = 2.5  # renewals that another one watches for
_log = logging.getLogger(__name__)


class Held(ValueError):
    """Another process holds the lock; the message names it and its host."""


@contextlib.contextmanager
def held(place: str) -> Iterator[None]:
    """Holds the lock that an object is, and renews it.

    Raises:
      Held: another process holds it.
    """
    mine = {"holder": f"process {os.getpid()} on {socket.gethostname()}", "token": uuid.uuid4().hex}
    _wait_until_free(place)
    _write(place, {**mine, "count": 0})
    time.sleep(min(1.0, RENEWED_S / 10))  # of two that write at once, the later one has it
    found = _read(place)
    if found is None or found["token"] != mine["token"]:
        raise Held(_message(place, found))
    done = threading.Event()
    thread = threading.Thread(target=_renew, args=(place, mine, done), name="object lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=RENEWED_S)
        with contextlib.suppress(Exception):
            if (_read(place) or {}).get("token") == mine["token"]:
                buckets.delete(place)


def _wait_until_free(place: str) -> None:
    first = _read(place)
    if first is None:
        return
    seconds = _WATCHED * RENEWED_S
    _log.info("%s names %s; watching for %.0f s whether it lives", place, first["holder"], seconds)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(min(1.0, RENEWED_S / 5))
        now = _read(place)
        if now is None:
            return
        if now != first:
            raise Held(_message(place, now))


def _renew(place: str, mine: dict[str, Any], done: threading.Event) -> None:
    count = 0
    while not done.wait(RENEWED_S):
        count += 1
        try:
            found = _read(place)
            if found is not None and found["token"] != mine["token"]:
                _log.warning("%s: %s has taken this run over; end one of both", place, found["holder"])
                return
            _write(place, {**mine, "count": count})
        except Exception as error:  # the bucket is away for a while
            _log.warning("%s is not renewed: %s: %s", place, type(error).__name__, error)


def _message(place: str, found: dict[str, Any] | None) -> str:
    holder = "another process" if found is None else found["holder"]
    folder = place.rpartition("/")[0]
    return (
        f"--workdir={folder} is in use by another run ({holder}); wait until it ends, stop it, or choose "
        "another folder"
    )


def _read(place: str) -> dict[str, Any] | None:
    try:
        found = json.loads(buckets.content(place))
        return {"holder": str(found["holder"]), "token": str(found["token"]), "count": int(found["count"])}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _write(place: str, found: dict[str, Any]) -> None:
    buckets.send(json.dumps(found).encode(), place)
