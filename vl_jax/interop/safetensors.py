"""The safetensors format: named tensors in one file, read without copying and written one tensor at a time.

    u64 little-endian n | n bytes JSON: {name: {"dtype", "shape", "data_offsets": [begin, end]}} | data

Offsets count from the start of the data, which the tensors fill without gap or overlap. A file is not
trusted: its header is checked in full before anything is read through it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from vl_jax.runtime import json_text

# The limit every reader of the format keeps; a longer header is damage or an attack.
MAX_HEADER = 100_000_000
MAX_COPY = 8 << 20  # bytes put in order at a time
METADATA = "__metadata__"

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

# numpy's own limits, which a header may exceed without any data if a size is 0.
MAX_AXES, MAX_BYTES = 64, 2**63 - 1


class WeightsError(ValueError):
    """Weights that cannot be read or do not fit; the message names the file or tensor and the rule."""


class Entry(NamedTuple):
    """What is known of a tensor before its data is read."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class TensorFile(Mapping[str, np.ndarray]):
    """An open file: ``file[name]`` is a read-only view of it, whose pages are read when they are used."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    begins: Mapping[str, int]  # in ``content``
    content: np.ndarray  # the whole file, u8

    def __getitem__(self, name: str) -> np.ndarray:
        entry, begin = self.entries[name], self.begins[name]
        return self.content[begin : begin + entry.nbytes].view(entry.dtype).reshape(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def open_file(path: Path) -> TensorFile:
    """Opens a file and checks its header.

    Raises:
      WeightsError: names the file, the tensor if there is one, and the rule of the format that is broken.
      OSError: there is no such file, or it may not be read.
    """
    try:
        header, start = _read_header(path)
        metadata = header.pop(METADATA, {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise WeightsError(f"{METADATA} must map strings to strings")
        size = path.stat().st_size - start
        spans = {name: _check_tensor(name, value, size) for name, value in header.items()}
        _check_filled(spans, size)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    entries = {name: entry for name, (entry, _, _) in spans.items()}
    begins = {name: start + begin for name, (_, begin, _) in spans.items()}
    # A plain view of the map: numpy's memmap class would leak into every array made from it.
    content = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
    return TensorFile(entries, metadata, begins, content)


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the data starts."""
    total = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if total < 8 or 8 + length > total:
            raise WeightsError(f"truncated: {total} bytes do not hold a header of {length}")
        if length > MAX_HEADER:
            raise WeightsError(f"header has {length} bytes, at most {MAX_HEADER} are allowed")
        raw = file.read(length)
    try:
        header = json_text.parse(raw, longest=MAX_HEADER, hook=_unique)
    except WeightsError:
        raise
    except ValueError as error:
        raise WeightsError(f"header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise WeightsError(f"header must be a JSON object, not {type(header).__name__}")
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, _ in pairs if counts[name] > 1)
        raise WeightsError(f"{twice!r} occurs twice in the header")
    return result


def _check_tensor(name: str, value: Any, size: int) -> tuple[Entry, int, int]:
    """Entry, begin and end of one tensor of the header, by itself; ``size`` is that of the data."""
    value = value if isinstance(value, dict) else {}
    label, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(label, str) or label not in DTYPES:
        raise WeightsError(f"tensor {name!r}: dtype {label!r} is not one of {', '.join(DTYPES)}")
    dtype = DTYPES[label]
    if not _counts(shape) or len(shape) > MAX_AXES:
        raise WeightsError(
            f"tensor {name!r}: shape {shape!r} must be a list of at most {MAX_AXES} integers >= 0"
        )
    if math.prod(max(n, 1) for n in shape) * dtype.itemsize > MAX_BYTES:
        raise WeightsError(f"tensor {name!r}: shape {shape} is larger than any array")
    if not _counts(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size:
        raise WeightsError(f"tensor {name!r}: data_offsets {offsets!r} must lie in order within 0..{size}")
    entry = Entry(tuple(shape), dtype)
    if entry.nbytes != offsets[1] - offsets[0]:
        raise WeightsError(
            f"tensor {name!r}: {label}{shape} takes {entry.nbytes} bytes, data_offsets {offsets}"
        )
    return entry, offsets[0], offsets[1]


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _check_filled(spans: Mapping[str, tuple[Entry, int, int]], size: int) -> None:
    """The tensors, in the order of their offsets, must fill the data exactly."""
    reached = 0
    for name, (_, begin, end) in sorted(spans.items(), key=lambda item: item[1][1:]):
        if begin != reached:
            kind = "leaves a gap after" if begin > reached else "overlaps"
            raise WeightsError(
                f"tensor {name!r}: data_offsets [{begin}, {end}] {kind} the data before, {reached}"
            )
        reached = end
    if reached != size:
        raise WeightsError(f"the tensors end at byte {reached} of the data, which has {size}")


def write_file(
    path: Path,
    entries: Mapping[str, Entry],
    arrays: Iterable[tuple[str, np.ndarray]],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file tensor by tensor, under a temporary name until it is complete.

    Args:
      path: Replaced if it exists.
      entries: Shape and dtype of every tensor.
      arrays: Name and array of every tensor, in any order; each is let go once it is written.
      metadata: Goes into the header.

    Raises:
      WeightsError: the arrays are not those of the entries, or a dtype has no name in the format.
    """
    header, begins = _make_header(path, entries, metadata or {})
    partial = path.with_name(f".{path.name}.partial")
    missing = set(entries)
    try:
        with partial.open("wb") as file:
            file.write(header)
            for name, array in arrays:
                if name not in missing:
                    raise WeightsError(f"{path}: tensor {name!r} was not announced, or came twice")
                if Entry(array.shape, array.dtype) != entries[name]:
                    found = Entry(array.shape, array.dtype)
                    raise WeightsError(f"{path}: tensor {name!r} is {found}, announced as {entries[name]}")
                missing.remove(name)
                file.seek(begins[name])
                _write_data(file, array)
                del array  # before the next one is made
            if missing:
                raise WeightsError(f"{path}: tensor {min(missing)!r} was announced and never came")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_data(file: BinaryIO, array: np.ndarray) -> None:
    """Writes an array's items in order; of one that does not lie so a few rows are copied at a time."""
    rows = np.atleast_1d(array)
    step = len(rows) if rows.flags.c_contiguous else MAX_COPY * len(rows) // rows.nbytes
    for start in range(0, len(rows), max(step, 1)):
        file.write(np.ascontiguousarray(rows[start : start + step]).reshape(-1).view(np.uint8).data)


def _make_header(
    path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The bytes before the data, and where in the file each tensor begins."""
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    begins: dict[str, int] = {}
    end = 0
    # Wide dtypes first, so that every tensor is aligned to its items.
    for name, entry in sorted(entries.items(), key=lambda item: -item[1].dtype.itemsize):
        if name == METADATA or entry.dtype not in NAMES:
            raise WeightsError(f"{path}: tensor {name!r} of {entry.dtype} has no name in the format")
        begins[name], end = end, end + entry.nbytes
        header[name] = {
            "dtype": NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [begins[name], end],
        }
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER:
        raise WeightsError(f"{path}: header has {len(raw)} bytes, at most {MAX_HEADER} are allowed")
    start = 8 + len(raw)
    return len(raw).to_bytes(8, "little") + raw, {name: start + begin for name, begin in begins.items()}
