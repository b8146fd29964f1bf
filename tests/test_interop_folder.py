from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from vl_jax.interop import folder as folders
from vl_jax.interop.folder import open_weights, read_config, write_folder
from vl_jax.interop.safetensors import Entry, WeightsError

CONFIG = {"architectures": ["Tiny"], "name": "é"}
ARRAYS = {f"layer.{i}": np.full((4, i + 1), i, np.float32) for i in range(5)}  # 16 bytes times i + 1
ENTRIES = {key: Entry(a.shape, a.dtype) for key, a in ARRAYS.items()}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_folder(tmp_path / "model", CONFIG, ENTRIES, ARRAYS.items(), shard_bytes=50)
    return tmp_path / "model"


def _edit_index(folder: Path, **changes: object) -> None:
    path = folder / folders.INDEX
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_small_weights_go_into_one_file(tmp_path: Path):
    write_folder(tmp_path / "model", CONFIG, ENTRIES, ARRAYS.items())
    assert {p.name for p in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors"}
    assert read_config(tmp_path / "model") == CONFIG
    weights = open_weights(tmp_path / "model")
    assert all(np.array_equal(weights[key], a) for key, a in ARRAYS.items()) and len(weights) == len(ARRAYS)


def test_shards_hold_no_more_than_asked_and_the_index_says_where(sharded: Path):
    index = json.loads((sharded / folders.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in ARRAYS.values())
    held: dict[str, int] = {}
    for key, name in index["weight_map"].items():
        held[name] = held.get(name, 0) + ARRAYS[key].nbytes
    # 16 + 32, then one each: the last two are larger than a shard by themselves.
    assert list(held.values()) == [48, 48, 64, 80]
    assert {p.name for p in sharded.iterdir()} == {"config.json", folders.INDEX, *held}
    weights = open_weights(sharded)
    assert weights.entries == ENTRIES
    assert all(np.array_equal(weights[key], a) for key, a in ARRAYS.items())


def test_keys_are_asked_for_one_at_a_time(tmp_path: Path):
    """The stream is drawn on only when the tensor before it is on disk."""
    partial = tmp_path / ".model.partial"

    def stream() -> Iterator[tuple[str, np.ndarray]]:
        for i, item in enumerate(ARRAYS.items()):
            finished = [p for p in partial.glob("*.safetensors") if not p.name.startswith(".")]
            assert len(finished) == [0, 0, 1, 2, 3][i]
            yield item

    write_folder(tmp_path / "model", CONFIG, ENTRIES, stream(), shard_bytes=50)
    assert len(open_weights(tmp_path / "model")) == len(ARRAYS)


def test_an_interrupted_write_leaves_nothing(tmp_path: Path):
    def stream() -> Iterator[tuple[str, np.ndarray]]:
        yield "layer.0", ARRAYS["layer.0"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "model", CONFIG, ENTRIES, stream(), shard_bytes=10)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_write_are_replaced(tmp_path: Path):
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "old.safetensors").write_bytes(b"old")
    write_folder(tmp_path / "model", CONFIG, ENTRIES, ARRAYS.items())
    assert {p.name for p in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors"}


def test_a_folder_is_never_overwritten(sharded: Path):
    with pytest.raises(WeightsError, match="exists already"):
        write_folder(sharded, CONFIG, ENTRIES, ARRAYS.items())


def test_arrays_out_of_order_or_unannounced_are_refused(tmp_path: Path):
    with pytest.raises(WeightsError, match="'layer.4' was not announced"):
        write_folder(tmp_path / "m", CONFIG, ENTRIES, reversed(ARRAYS.items()), shard_bytes=50)
    with pytest.raises(WeightsError, match="'more' was not announced"):
        write_folder(tmp_path / "m", CONFIG, ENTRIES, [*ARRAYS.items(), ("more", np.ones(1))])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ([], "weight_map must be an object"),
        (None, "weight_map must be an object"),
        ({"a": 3}, "weight_map must be an object"),
        ({"a": "gone.safetensors"}, "shard 'gone.safetensors' does not exist"),
        ({"a": "../config.json"}, "shard '../config.json' is not inside the folder"),
        ({"a": "/etc/passwd"}, "shard '/etc/passwd' is not inside the folder"),
        ({"a": ""}, "shard '' is not inside the folder"),
        ({"a": "model-00001-of-00004.safetensors"}, "does not hold 'a'"),
        ({"layer.0": "model-00001-of-00004.safetensors"}, "holds 'layer.1', which .* does not say"),
    ],
)
def test_a_wrong_index_is_one_line(sharded: Path, weight_map: object, message: str):
    _edit_index(sharded, weight_map=weight_map)
    with pytest.raises(WeightsError, match=message) as caught:
        open_weights(sharded)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "\xff" * 3, "[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", folders.INDEX])
def test_json_that_is_no_object_is_one_line(sharded: Path, name: str, text: str):
    (sharded / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(WeightsError, match=f"{name}: ") as caught:
        (read_config if name == "config.json" else open_weights)(sharded)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickles_are_refused(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(WeightsError, match=f"{name} is a pickle and is not read; convert to safetensors"):
        open_weights(tmp_path)


def test_a_folder_without_weights_or_config_says_so(tmp_path: Path):
    with pytest.raises(WeightsError, match="no weights, neither model.safetensors nor"):
        open_weights(tmp_path)
    with pytest.raises(WeightsError, match="no config.json"):
        read_config(tmp_path)


def test_links_out_of_the_folder_are_followed(sharded: Path, tmp_path: Path):
    """The hub's cache keeps files in one folder and links to them from another."""
    (tmp_path / "snapshot").mkdir()
    for path in sharded.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert set(open_weights(tmp_path / "snapshot")) == set(ARRAYS)
