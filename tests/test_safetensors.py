from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vl_jax.interop import safetensors
from vl_jax.interop.safetensors import DTYPES, Entry, WeightsError, open_file, write_file


def _bits(array: np.ndarray) -> tuple[tuple[int, ...], np.dtype, bytes]:
    return array.shape, array.dtype, array.tobytes()


def _random(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Every bit pattern of the dtype may occur, NaNs with payloads included."""
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    items = rng.integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8)
    return np.frombuffer(items.tobytes(), dtype).reshape(shape)


def _write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def _tensor(dtype: str = "U8", shape: object = (2,), offsets: object = (0, 2)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_bytes_laid_out_by_hand_are_read(tmp_path: Path):
    """Worked from the description of the format, independent of the writer; ``w`` is not aligned."""
    header = {
        "__metadata__": {"format": "pt"},
        "b": _tensor("U8", [3], [0, 3]),
        "w": _tensor("BF16", [2, 1], [3, 7]),
        "e": _tensor("F32", [0, 4], [7, 7]),
        "s": _tensor("I64", [], [7, 15]),
    }
    data = bytes([1, 2, 3]) + bytes.fromhex("803f00c0") + (-5).to_bytes(8, "little", signed=True)
    file = open_file(_write_raw(tmp_path / "x.safetensors", header, data))
    assert file["b"].tolist() == [1, 2, 3]
    assert file["w"].astype(np.float32).tolist() == [[1.0], [-2.0]]
    assert file["e"].shape == (0, 4)
    assert file["s"].shape == () and int(file["s"]) == -5
    assert file.metadata == {"format": "pt"}
    assert file.entries["w"] == ((2, 1), DTYPES["BF16"])


@settings(max_examples=30, deadline=None)
@given(
    tensors=st.dictionaries(
        st.text(max_size=8).filter(lambda name: name != safetensors.METADATA and name.isprintable()),
        st.tuples(st.lists(st.integers(0, 3), max_size=4).map(tuple), st.sampled_from(sorted(DTYPES))),
        max_size=6,
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_tensors_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, tuple[tuple[int, ...], str]], seed: int
):
    rng = np.random.default_rng(seed)
    arrays = {name: _random(rng, shape, DTYPES[dtype]) for name, (shape, dtype) in tensors.items()}
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    write_file(path, {name: Entry(a.shape, a.dtype) for name, a in arrays.items()}, arrays.items())
    file = open_file(path)
    assert {name: _bits(file[name]) for name in file} == {name: _bits(a) for name, a in arrays.items()}
    assert all(file[name].flags.aligned and not file[name].flags.writeable for name in file)


def test_strided_arrays_are_written_in_order(tmp_path: Path):
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1)
    write_file(tmp_path / "x", {"a": Entry(array.shape, array.dtype)}, [("a", array)])
    assert np.array_equal(open_file(tmp_path / "x")["a"], array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b"\x10\0\0\0", "truncated"),
        ((50).to_bytes(8, "little") + b"{}", "truncated: 10 bytes do not hold a header of 50"),
        ((2**63).to_bytes(8, "little") + b"{}", "truncated"),
    ],
)
def test_files_that_end_early_are_refused(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        open_file(path)


def test_headers_over_the_limit_are_refused_unread(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((safetensors.MAX_HEADER + 1).to_bytes(8, "little"))
        file.truncate(8 + safetensors.MAX_HEADER + 1)  # sparse
    tracemalloc.start()
    with pytest.raises(WeightsError, match="at most 100000000 are allowed"):
        open_file(path)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "not JSON"),
        (b"\xff{}", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        ([], "must be a JSON object, not list"),
        (b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"a":1}', "'a' occurs twice"),
        ({"__metadata__": {"a": 1}}, "__metadata__ must map strings to strings"),
        ({"__metadata__": []}, "__metadata__ must map strings to strings"),
        ({"a": None}, "tensor 'a': dtype None"),
        ({"a": _tensor("F4")}, "tensor 'a': dtype 'F4' is not one of BOOL"),
        ({"a": _tensor(shape=[-2])}, "tensor 'a': shape"),
        ({"a": _tensor(shape=[2.0])}, "tensor 'a': shape"),
        ({"a": _tensor(shape=[True, 2])}, "tensor 'a': shape"),
        ({"a": _tensor(shape=2)}, "tensor 'a': shape"),
        ({"a": _tensor(shape=[1] * 65 + [2])}, "at most 64 integers"),
        ({"a": _tensor(shape=[2**70, 0], offsets=[0, 0])}, "larger than any array"),
        ({"a": _tensor(shape=[3])}, r"tensor 'a': U8\[3\] takes 3 bytes"),
        ({"a": _tensor("F64", shape=[1])}, r"tensor 'a': F64\[1\] takes 8 bytes"),
        ({"a": _tensor(offsets=[0, 3])}, "within 0..2"),
        ({"a": _tensor(offsets=[2, 0])}, "must lie in order"),
        ({"a": _tensor(offsets=[0])}, "must lie in order"),
        ({"a": _tensor(offsets=[-2, 0])}, "must lie in order"),
        ({"a": _tensor(shape=[1], offsets=[1, 2])}, "tensor 'a'.*leaves a gap"),
        ({"a": _tensor(), "b": _tensor(shape=[1], offsets=[1, 2])}, "tensor 'b'.*overlaps"),
        ({"a": _tensor(), "b": _tensor()}, "tensor 'b'.*overlaps"),
        ({"a": _tensor(shape=[1], offsets=[0, 1])}, "end at byte 1 of the data, which has 2"),
        ({}, "end at byte 0 of the data, which has 2"),
    ],
)
def test_each_broken_rule_is_one_line_with_the_file(tmp_path: Path, header: object, message: str):
    path = _write_raw(tmp_path / "broken.safetensors", header, b"ab")
    with pytest.raises(WeightsError, match=message) as caught:
        open_file(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_headers_raise_nothing_else(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    header = json.dumps({"a": _tensor("F32", [2], [0, 8]), "b": _tensor("U8", [4], [8, 12])}).encode()
    raw = bytearray(len(header).to_bytes(8, "little") + header + bytes(12))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "x.safetensors"
    path.write_bytes(bytes(raw[: data.draw(st.integers(0, len(raw)))]))
    try:
        file = open_file(path)
    except WeightsError:
        return
    for name in file:
        assert file[name].shape == file.entries[name].shape


def test_nothing_is_copied_until_it_is_used(tmp_path: Path):
    array = np.zeros((64, 1024, 256), np.float32)  # 64 MiB
    write_file(tmp_path / "x", {"a": Entry(array.shape, array.dtype)}, [("a", array)])
    tracemalloc.start()
    view = open_file(tmp_path / "x")["a"]
    assert view[3, 5].sum() == 0
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


ENTRIES = {"a": Entry((2,), np.dtype(np.float32)), "b": Entry((1,), np.dtype(np.int8))}
A, B = np.ones(2, np.float32), np.ones(1, np.int8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ([("a", A)], "'b' was announced and never came"),
        ([("a", A), ("b", B), ("c", B)], "'c' was not announced"),
        ([("a", A), ("a", A)], "'a' was not announced, or came twice"),
        ([("a", A[:1])], "'a' is .* announced as"),
        ([("b", B.astype(np.uint8))], "'b' is .* announced as"),
    ],
)
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, arrays: list[tuple[str, np.ndarray]], message: str
):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(WeightsError, match=message):
        write_file(path, ENTRIES, arrays)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_bytes() == b"old"


def test_a_dtype_without_a_name_is_refused(tmp_path: Path):
    with pytest.raises(WeightsError, match="'a' of complex128 has no name"):
        write_file(tmp_path / "x", {"a": Entry((1,), np.dtype(np.complex128))}, [])


def test_recorded_files_are_read_and_rewritten_alike(oracles: Path, tmp_path: Path):
    """Files written by the reference implementation of the format."""
    paths = sorted(oracles.rglob("*.safetensors"))
    if not paths:
        pytest.skip(f"no safetensors in {oracles}")
    for path in paths[:: max(1, len(paths) // 8)]:
        file = open_file(path)
        write_file(tmp_path / "x", file.entries, file.items())
        again = open_file(tmp_path / "x")
        assert {name: _bits(again[name]) for name in again} == {name: _bits(file[name]) for name in file}
