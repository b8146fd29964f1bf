"""A folder in the layout of the Hugging Face hub: ``config.json`` and the weights, in one file or in shards.

    config.json
    model.safetensors                    or    model.safetensors.index.json    {"weight_map": {key: shard}}
                                               model-00001-of-00002.safetensors
                                               model-00002-of-00002.safetensors

Only safetensors are read: a pickle (``.bin``, ``.pt``, ``.pth``) runs the code of whoever wrote it.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from vl_jax.interop.safetensors import Entry, TensorFile, WeightsError, open_file, write_file
from vl_jax.runtime import json_text
from vl_jax.runtime.storage import folders

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth")

# Other readers ask which library's layout a file has, and refuse a file that does not say.
METADATA = {"format": "pt"}


@dataclasses.dataclass(frozen=True)
class Weights(Mapping[str, np.ndarray]):
    """The tensors of a folder: ``weights[key]`` is a memory-mapped view, read when used, or computed."""

    entries: Mapping[str, Entry]  # shape and dtype of every key
    files: Mapping[str, TensorFile]  # the file that holds each key
    made: Mapping[str, Callable[[], np.ndarray]] = dataclasses.field(default_factory=dict)  # not in a file so

    def __getitem__(self, key: str) -> np.ndarray:
        return self.made[key]() if key in self.made else self.files[key][key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's ``config.json``.

    Raises:
      WeightsError: the file is missing or is no JSON object.
    """
    if not (folder / CONFIG).is_file():
        raise WeightsError(f"{folder}: no {CONFIG}")
    return _read_object(folder / CONFIG)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json_text.read(path)
    except ValueError as error:
        raise WeightsError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: must be a JSON object, not {type(value).__name__}")
    return value


def open_weights(folder: Path) -> Weights:
    """Opens every weight file of a folder and checks the headers and the index; no data is read.

    Raises:
      WeightsError: one line that names the file or key and the rule.
    """
    if (folder / SINGLE).is_file():
        file = open_file(folder / SINGLE)
        return Weights(file.entries, dict.fromkeys(file, file))
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
        if pickles:
            raise WeightsError(f"{folder}: {pickles[0]} is a pickle and is not read; convert to safetensors")
        quantised = sorted(path.name for path in folder.glob("*.gguf"))
        if quantised:
            raise WeightsError(
                f"{folder}: {quantised[0]} is quantised in the format GGUF, which is not read; take the "
                f"safetensors it was made of"
            )
        raise WeightsError(f"{folder}: no weights, neither {SINGLE} nor {INDEX}")
    weight_map = _read_index(folder)
    shards = {name: open_file(folder / name) for name in sorted(set(weight_map.values()))}
    for key, name in weight_map.items():
        if key not in shards[name]:
            raise WeightsError(f"{folder / name}: does not hold {key!r}, which {INDEX} says it does")
    for name, shard in shards.items():
        for key in shard:
            if weight_map.get(key) != name:
                raise WeightsError(f"{folder / name}: holds {key!r}, which {INDEX} does not say")
    files = {key: shards[name] for key, name in weight_map.items()}
    return Weights({key: file.entries[key] for key, file in files.items()}, files)


def _read_index(folder: Path) -> dict[str, str]:
    """Key to name of shard, all of which exist."""
    path = folder / INDEX
    weight_map = _read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise WeightsError(f"{path}: weight_map must be an object of key to file name")
    for name in sorted(set(weight_map.values())):
        # As written, not resolved: in the hub's own cache every file is a link to another folder.
        if not name or PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise WeightsError(f"{path}: shard {name!r} is not inside the folder")
        if not (folder / name).is_file():
            raise WeightsError(f"{path}: shard {name!r} does not exist")
    return weight_map


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    entries: Mapping[str, Entry],
    arrays: Iterable[tuple[str, np.ndarray]],
    *,
    copies: Iterable[Path] = (),
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a folder that exists only once it is complete.

    Args:
      folder: Must not exist yet.
      config: For ``config.json``.
      entries: Shape and dtype of every tensor.
      arrays: The tensors, in the order of the entries; each is let go once it is written.
      copies: Files to copy beside them, e.g. a tokenizer's.
      shard_bytes: Most bytes of tensors in one file, unless one tensor alone is larger.

    Raises:
      WeightsError: the folder exists, or the arrays are not those of the entries.
    """
    if folder.exists():
        raise WeightsError(f"{folder}: exists already")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for file in copies:
            shutil.copyfile(file, partial / file.name)
        _write_json(partial / CONFIG, config)
        _write_shards(partial, _split(entries, shard_bytes), iter(arrays))
        folders.move(partial, folder, last=CONFIG)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _split(entries: Mapping[str, Entry], shard_bytes: int) -> list[dict[str, Entry]]:
    """Consecutive groups of entries, each as large as fits; at least one, which may be empty."""
    groups: list[dict[str, Entry]] = [{}]
    filled = 0
    for key, entry in entries.items():
        if groups[-1] and filled + entry.nbytes > shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][key] = entry
        filled += entry.nbytes
    return groups


def _write_shards(
    folder: Path, groups: list[dict[str, Entry]], arrays: Iterator[tuple[str, np.ndarray]]
) -> None:
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        name = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_file(folder / name, group, islice(arrays, len(group)), metadata=METADATA)
        weight_map |= dict.fromkeys(group, name)
    for key, _ in arrays:
        raise WeightsError(f"{folder}: tensor {key!r} was not announced")
    if len(groups) > 1:
        total = sum(entry.nbytes for group in groups for entry in group.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
