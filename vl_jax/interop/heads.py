"""The folder of a head by itself: its config, the widths it needs, and its parameters.

    head.json           config of the head, widths of the streams it reads, shape and checksum of every leaf
    head.safetensors    the parameters by path, and running statistics if the head has any

Such a folder is small: the towers are not in it. What it was trained on is in it as a number, so that a head
that meets other towers of the same widths is noticed.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vl_jax import params as params_lib
from vl_jax import schema
from vl_jax.heads.build import AnyHead
from vl_jax.interop.safetensors import Entry, WeightsError, open_file, write_file
from vl_jax.runtime import disk, json_text
from vl_jax.runtime.checksums import checksums

DESCRIPTION, TENSORS = "head.json", "head.safetensors"
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class StreamWidths:
    """How wide a stream is: its tokens, its own vector if it has one, and its maps, finest first."""

    tokens: int
    pooled: int | None = None
    maps: tuple[int, ...] = ()

    @classmethod
    def of(cls, stream: Any) -> StreamWidths:
        """Those of a stream, or of its shapes."""
        pooled = None if stream.pooled is None else stream.pooled.shape[-1]
        return cls(stream.tokens.shape[-1], pooled, tuple(m.shape[-1] for m in stream.maps))

    def __str__(self) -> str:
        parts = [f"tokens of {self.tokens}"]
        parts += [f"a vector of {self.pooled}"] if self.pooled is not None else []
        return " and ".join([*parts, f"maps of {list(self.maps)}" if self.maps else "no maps"])


@dataclasses.dataclass(frozen=True)
class StoredHead:
    """A head as its folder holds it; ``variables()`` reads the parameters."""

    folder: Path
    config: Any  # of the head
    streams: Mapping[str, StreamWidths]  # what it reads, by name
    shapes: Mapping[str, tuple[int, ...]]  # of its leaves by path: ``params/...``
    trunk: int  # see ``trunk_mark``
    sums: Mapping[str, int]  # checksums, by path

    def variables(self) -> dict[str, Any]:
        """The parameters under ``params``, and collections by name; read now, and compared with checksums.

        Raises:
          WeightsError: the file is damaged, or of another head.
        """
        path = self.folder / TENSORS
        if not path.is_file():
            raise WeightsError(f"{self.folder}: no {TENSORS}; export the head again")
        file = open_file(path)
        if {name: entry.shape for name, entry in file.entries.items()} != dict(self.shapes):
            raise WeightsError(f"{path}: its tensors are not those that {DESCRIPTION} lists; export it again")
        found = {name: np.array(file[name]) for name in file}
        damaged = sorted(name for name, sum_ in _sums(found).items() if sum_ != self.sums[name])
        if damaged:
            raise WeightsError(f"{path}: damaged: the checksum of {damaged[0]} differs; export it again")
        return params_lib.unflatten(found)


def write_head(
    folder: Path,
    config: Any,
    variables: Mapping[str, Any],
    streams: Mapping[str, StreamWidths],
    *,
    trunk: int,
) -> None:
    """Writes the folder of a head.

    Args:
      folder: must not exist, or be empty.
      config: of the head.
      variables: what it has alone: ``params``, and collections by name if there are any.
      streams: the widths of what it reads, by name.
      trunk: what it was trained on, see ``trunk_mark``.

    Raises:
      WeightsError: the folder holds something, or a parameter is not finite.
      OSError: it cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WeightsError(f"{folder}: exists already; choose another folder")
    leaves = params_lib.flatten(jax.device_get(dict(variables)))
    flat = {path: np.asarray(leaf) for path, leaf in leaves.items()}
    odd = next((path for path, leaf in flat.items() if not np.isfinite(leaf.astype(np.float32)).all()), None)
    if odd is not None:
        raise WeightsError(f"{folder}: {odd} of head {config.name!r} is not finite, so it is not written")
    sums = _sums(flat)
    description = {
        "version": _VERSION,
        "head": json.loads(schema.to_json(config)),
        "streams": {name: dataclasses.asdict(widths) for name, widths in streams.items()},
        "trunk": trunk,
        "parameters": {p: {"shape": list(leaf.shape), "checksum": sums[p]} for p, leaf in flat.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    entries = {path: Entry(leaf.shape, leaf.dtype) for path, leaf in flat.items()}
    with disk.naming(folder / TENSORS, needed=sum(leaf.nbytes for leaf in flat.values())):
        write_file(folder / TENSORS, entries, flat.items())
    disk.write_text(folder / DESCRIPTION, json.dumps(description, indent=2, ensure_ascii=False) + "\n")


def read_head(folder: Path) -> StoredHead:
    """Opens the folder of a head; its parameters are not read yet.

    Raises:
      WeightsError: there is no such folder, or its description is damaged.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise WeightsError(f"{folder}: holds no head (no {DESCRIPTION}); `vl_jax convert --head` writes one")
    try:
        found = json_text.parse(path.read_bytes())
        version = found["version"]
        if version != _VERSION:
            raise WeightsError(f"version {version!r}, this vl_jax reads {_VERSION}")
        config = schema.rebuild(found["head"], AnyHead, "head")
        streams = {k: schema.rebuild(v, StreamWidths, f"streams.{k}") for k, v in found["streams"].items()}
        leaves = found["parameters"]
        shapes = {name: tuple(map(int, leaf["shape"])) for name, leaf in leaves.items()}
        sums = {name: int(leaf["checksum"]) for name, leaf in leaves.items()}
        trunk = int(found["trunk"])
    except schema.ConfigError as error:
        raise WeightsError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise WeightsError(f"{path}: damaged ({reason}); export the head again") from None
    return StoredHead(folder, config, streams, shapes, trunk, sums)


def trunk_mark(params: Mapping[str, Any], modules: Iterable[str]) -> int:
    """A number that stands for the values of the modules that a head stands on.

    Args:
      params: of a model, by module.
      modules: their names; one without parameters is passed over.
    """
    trunk = {module: params[module] for module in modules if module in params}
    return zlib.crc32(json.dumps(sorted(checksums(trunk).items())).encode())


def _sums(flat: Mapping[str, np.ndarray]) -> dict[str, int]:
    """The checksum of every leaf, by path."""
    return dict(zip(sorted(flat), checksums(dict(flat)).values(), strict=True))
