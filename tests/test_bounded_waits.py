"""No wait without a bound, checked on the source text: what does not come is named, and none hangs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Methods that wait for ever without an argument, and functions that do so without ``timeout``.
WAITING = {"join", "wait", "get", "result", "acquire", "communicate", "wait_until_finished", "recv"}
TIMED = {"run", "call", "check_call", "check_output", "urlopen", "create_connection"}
# Those with a bound of their own: how many arguments they need for it.
BOUNDED = {"blocking_key_value_get": 2, "blocking_key_value_get_bytes": 2, "wait_at_barrier": 2}

# What bounds the others. "watchdog": the run's, by which a run that stands still ends (``loop.watchdog``).
ELSEWHERE = {
    ("vl_jax/checkpoint.py", "self._manager.wait_until_finished"): "orbax's own bound, and the watchdog",
    ("vl_jax/checkpoint.py", "self.wait"): "as above",
    ("tests/test_buckets.py", "checkpointer.wait"): "as above",
    ("tests/test_collections.py", "checkpointer.wait"): "as above",
    ("tests/test_renames.py", "checkpointer.wait"): "as above",
    ("tests/test_renames.py", "checkpointer._manager.wait_until_finished"): "as above",
    ("vl_jax/train/loop.py", "run.checkpointer.wait"): "as above",
    ("vl_jax/data/stream/packed.py", "next_plan.result"): "the watchdog",
    ("vl_jax/data/stream/workers.py", "future.result"): "the watchdog",
    ("vl_jax/data/stream/worker_processes.py", "self._pipe.recv"): "poll came before",
    ("vl_jax/data/stream/worker_processes.py", "pipe.recv"): "a worker; ends with its pipe",
    ("vl_jax/benchmarks/step.py", "self._pipe.recv"): "poll came before",
    ("vl_jax/benchmarks/step.py", "pipe.recv"): "a side; ends with its pipe",
    ("vl_jax/runtime/lazy_storage.py", "window[part].read().result"): "tensorstore's own bound",
    ("vl_jax/sharding.py", "_rules.get"): "a context variable",
    ("vl_jax/moe/bounded/rooms.py", "_noted.get"): "a context variable",
}


def unbounded(text: str, file: str) -> Iterator[tuple[str, str]]:
    """Calls that may wait for ever, and where."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, (ast.Attribute, ast.Name)):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
        shown, given = ast.unparse(node.func), {keyword.arg for keyword in node.keywords}
        endless = name in WAITING and not node.args and not given & {"timeout", None}
        if isinstance(node.func, ast.Name):
            endless = False
        if name in TIMED and (shown.startswith("subprocess.") or name in ("urlopen", "create_connection")):
            endless = not given & {"timeout", None}
        if name in BOUNDED:
            endless = len(node.args) < BOUNDED[name] and not any("timeout" in (arg or "") for arg in given)
        if name == "flock":
            endless = not any(word in ast.unparse(node) for word in ("LOCK_NB", "LOCK_UN"))
        if endless and (file, shown) not in ELSEWHERE and ".at[" not in shown:
            yield f"{file}:{node.lineno}", shown


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["vl_jax", "tests"])
def test_every_wait_has_a_bound(folder):
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        file = path.relative_to(ROOT).as_posix()
        found += unbounded(path.read_text(encoding="utf-8"), file)
    assert not found, "\n".join(f"{where}: {what}" for where, what in found)


def test_what_is_not_looked_at_any_more_is_not_excused():
    for file, shown in ELSEWHERE:
        assert f"{shown}(" in (ROOT / file).read_text(encoding="utf-8"), (file, shown)


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ("thread.join()", True),
        ("thread.join(5)", False),
        ("','.join(words)", False),
        ("queue.get()", True),
        ("queue.get(timeout=1)", False),
        ("subprocess.run(['true'])", True),
        ("subprocess.run(['true'], timeout=3)", False),
        ("subprocess.run(['true'], **options)", False),
        ("client.blocking_key_value_get('x')", True),
        ("client.wait_at_barrier('x', 1000)", False),
        ("fcntl.flock(file, fcntl.LOCK_EX)", True),
        ("socket.create_connection(address)", True),
    ],
)
def test_waits_by_hand(text, bad):
    assert bool(list(unbounded(text, "a.py"))) == bad
