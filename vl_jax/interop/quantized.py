"""Quantised checkpoints: two documented formats are read as the numbers they stand for, the others are named.

FP8 in blocks (DeepSeek-V3): a weight of 8-bit floats, and ``<weight>_scale_inv`` with a factor for each block
of 128 x 128 (``quantization_config.weight_block_size``), or one in all. MXFP4 (GPT-OSS, Microscaling 1.0):
``<weight>_blocks``, two 4-bit floats a byte; 32 in a row share an exponent of two of ``<weight>_scales``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vl_jax.interop.folder import Weights
from vl_jax.interop.safetensors import Entry, WeightsError

CONFIGS = ("quantization_config", "compression_config")
_PARTS = ("text_config", "language_config")  # a config that has a config of its own for the language model
SCALE, BLOCKS, SCALES = "_scale_inv", "_blocks", "_scales"
_ACTIVATION = (".input_scale", ".activation_scale")  # of products in 8 bits, of which there are none here
_BLOCK = (128, 128)
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_NUMBERS = np.dtype(np.float32)

# What the tensors of other formats are called, for folders whose config does not say.
_SIGNS = {
    r".*\.(qweight|qzeros|g_idx)": "GPTQ or AWQ",
    r".*(\.SCB|\.absmax|\.quant_map|\.nested_absmax|\.nested_quant_map|\.quant_state\..*)": "bitsandbytes",
    r".*\.weight_scale_2": "NVFP4",
    r".*\.(weight_packed|weight_scale|weight_zero_point|weight_shape|weight_g_idx)": "compressed-tensors",
    r".*\.(q_weight|q_invperm|q_scale|q_groups|trellis)": "EXL2 or EXL3",
    r".*\.(W_q|codebooks|codes|weight\._data|weight\._scale)": "HQQ, AQLM or quanto",
    rf".*({SCALE}|{BLOCKS}|{SCALES})": "FP8 or MXFP4",
}
_REMEDY = (
    "take the checkpoint in bfloat16, float16 or float32, or dequantise it with the library that wrote it "
    "and save it as safetensors"
)


def as_numbers(folder: Path, fields: Mapping[str, Any], weights: Weights) -> Weights:
    """The weights as plain numbers: what was in a known format is computed when it is used, float32.

    Raises:
      WeightsError: they are quantised in another format, or their scales do not fit; one line that names it.
    """
    config = _config(fields)
    method = str(config.get("quant_method") or ("bitsandbytes" if _loads_bits(config) else ""))
    made: dict[str, Callable[[], np.ndarray]] = {}
    entries = dict(weights.entries)
    for key in weights.entries:
        name = key.removesuffix(SCALE)
        if name != key and name in weights.entries and entries[name].dtype.itemsize == 1:
            made[name] = functools.partial(_scaled, weights, name, _block(folder, config))
            _check_scale(folder, weights, name, _block(folder, config))
            entries[name] = Entry(entries[name].shape, _NUMBERS)
            del entries[key]
        name = key.removesuffix(BLOCKS)
        if name != key and name + SCALES in weights.entries:
            entries[name] = Entry(_check_blocks(folder, weights, name), _NUMBERS)
            made[name] = functools.partial(_unpacked, weights, name)
            del entries[key], entries[name + SCALES]
    for name in made:
        for suffix in _ACTIVATION:
            entries.pop(name.removesuffix(".weight") + suffix, None)
    _refuse(folder, method, entries)
    if not made:
        return weights
    # Parts of a tensor are asked for one after the other.
    latest = functools.lru_cache(maxsize=1)(lambda key: made[key]())
    return Weights(entries, weights.files, {key: functools.partial(latest, key) for key in made})


def without_quantization(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A config of the same model whose weights are plain numbers."""
    kept = {key: value for key, value in fields.items() if key not in CONFIGS}
    inner = {key: without_quantization(kept[key]) for key in _PARTS if isinstance(kept.get(key), Mapping)}
    return {**kept, **inner}


def _config(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = [fields[key] for key in _PARTS if isinstance(fields.get(key), Mapping)]
    found = [part[key] for part in (fields, *inner) for key in CONFIGS if isinstance(part.get(key), Mapping)]
    return found[0] if found else {}


def _loads_bits(config: Mapping[str, Any]) -> bool:
    return bool(config.get("load_in_4bit") or config.get("load_in_8bit"))


def _refuse(folder: Path, method: str, entries: Mapping[str, Entry]) -> None:
    """Raises for tensors that are quantised in a format that is not read."""
    for key, entry in entries.items():
        sign = next((name for pattern, name in _SIGNS.items() if re.fullmatch(pattern, key)), None)
        narrow = method and entry.dtype.itemsize == 1 and entry.dtype != np.bool_
        if sign or narrow:
            by = f"config.json says quant_method={method!r}" if method else f"the names are those of {sign}"
            raise WeightsError(
                f"{folder}: the weights are quantised ({by}; tensor {key} of {entry.dtype}), which cannot be "
                f"read: {_REMEDY}"
            )


def _block(folder: Path, config: Mapping[str, Any]) -> tuple[int, int]:
    size = config.get("weight_block_size") or _BLOCK
    if not (
        isinstance(size, (list, tuple)) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
    ):
        raise WeightsError(f"{folder}: quantization_config.weight_block_size={size!r}: must be two sizes")
    return size[0], size[1]


def _check_scale(folder: Path, weights: Weights, key: str, block: tuple[int, int]) -> None:
    entry, scale = weights.entries[key], weights.entries[key + SCALE]
    *outer, rows, columns = (1, 1, *entry.shape)[-max(len(entry.shape), 2) :]
    expected = (*outer, -(-rows // block[0]), -(-columns // block[1]))
    if scale.dtype.kind in "biu" or (scale.shape != expected and scale.shape not in ((), (1,))):
        raise WeightsError(
            f"{folder}: the quantised tensor {key} of {entry.shape} has scales of {scale.dtype} "
            f"{scale.shape}; blocks of {block} need floats of {expected}"
        )


def _scaled(weights: Weights, key: str, block: tuple[int, int]) -> np.ndarray:
    """A weight in FP8 times the factors of its blocks."""
    numbers, scale = weights[key].astype(np.float32), weights[key + SCALE].astype(np.float32)
    if scale.ndim < 2:
        return numbers * scale.reshape(())
    rows, columns = numbers.shape[-2:]
    wide = np.repeat(scale, block[1], axis=-1)[..., :columns]
    for start in range(0, rows, block[0]):  # a row of blocks at a time
        numbers[..., start : start + block[0], :] *= wide[..., start // block[0], None, :]
    return numbers


def _check_blocks(folder: Path, weights: Weights, key: str) -> tuple[int, ...]:
    """The shape of the numbers, whose last two axes the format exchanges."""
    blocks, scales = weights.entries[key + BLOCKS], weights.entries[key + SCALES]
    shape = blocks.shape
    if blocks.dtype != np.uint8 or scales.dtype.itemsize != 1 or len(shape) < 3 or shape[:-1] != scales.shape:
        raise WeightsError(
            f"{folder}: the quantised tensor {key} has blocks of {blocks.dtype} {shape} and scales of "
            f"{scales.dtype} {scales.shape}; MXFP4 needs bytes, and a scale for each run of 16"
        )
    *outer, rows, runs, width = shape
    return (*outer, 2 * runs * width, rows)


def _unpacked(weights: Weights, key: str) -> np.ndarray:
    """A weight in MXFP4: two numbers a byte, the low half first, times two to the exponent of their run."""
    blocks, scales = weights[key + BLOCKS], weights[key + SCALES].view(np.uint8)
    numbers = np.stack([_FP4[blocks & 15], _FP4[blocks >> 4]], axis=-1).reshape(*blocks.shape[:-1], -1)
    numbers = np.ldexp(numbers, scales[..., None].astype(np.int32) - 127)
    return np.swapaxes(numbers.reshape(*blocks.shape[:-2], -1), -1, -2)
