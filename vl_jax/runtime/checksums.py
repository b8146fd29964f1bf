"""Checksums of arrays: a number for each leaf of a tree, the same for every sharding and every machine.

    sum over all elements of mix(bits + index * GOLDEN)    modulo 2**32

``mix`` is the finaliser of MurmurHash3. It is one-to-one, so a change of one element is always seen. It stirs
every bit into every other, so changes of several elements cancel by chance alone, once in 2**32.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, UInt, UInt32

from vl_jax.runtime.lazy_array import LazyArray

GOLDEN = 0x9E3779B9
# (shift to the right, factor) in turn.
_ROUNDS = ((16, 0x85EBCA6B), (13, 0xC2B2AE35))
_LAST_SHIFT = 16
# Bits of a number's exponent: all are set if and only if it is infinite or none.
_EXPONENTS = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}
_THREADS = min(8, os.cpu_count() or 1)
_BLOCK = 1 << 16  # elements the host works on at a time: they stay in the cache
_COMPILED = (1 << 22, 1 << 19)  # elements of a large array that it leaves to compiled programs at a time
_LANES = 1 << 14  # elements of which these work on one after the other
_INDEX = np.arange(_BLOCK, dtype=np.uint32) * np.uint32(GOLDEN)

Bits = UInt32[Array, "*shape"]
Sums = dict[str, int]


def checksums(tree: Any) -> Sums:
    """A checksum of every leaf of a tree of arrays, by ``jax.tree_util.keystr`` of its path.

    Leaves are of 1, 2 or 4 bytes an element, those in host memory of 8 as well.
    """
    return examined(tree)[0]


def examined(tree: Any) -> tuple[Sums, list[str]]:
    """The checksums of a tree, and what ``not_finite`` says of it, in one pass over memory."""
    leaves = _named(tree)
    here, others = _split(leaves)
    # What is read from disk is read piece by piece, one at a time: there may be no room for several.
    found = {name: _stirred_on_host(array) for name, array in here.items() if leaves[name] is array}
    held = {name: array for name, array in here.items() if name not in found}
    with ThreadPoolExecutor(_THREADS) as pool:  # numpy lets others work meanwhile
        at_once = functools.partial(_stirred_on_host, at_once=True)
        found |= zip(held, pool.map(at_once, held.values()), strict=True)
    if others:
        sums, fine = jax.device_get(_stirred_on_devices(list(others.values())))
        found |= {name: (int(v), bool(f)) for name, v, f in zip(others, sums, fine, strict=True)}
    return {name: found[name][0] for name in leaves}, [name for name in leaves if not found[name][1]]


def earlier_checksums(tree: Any) -> Sums:
    """The checksums that earlier versions wrote: an even number of sign flips does not change them."""
    # Compiled for a CPU, a sum holds all its terms: the host has a way of its own.
    here, others = _split(_named(tree))
    sums = {name: _weighted_on_host(array) for name, array in here.items()}
    if others:
        values = jax.device_get(_weighted_on_devices(list(others.values())))
        sums |= {name: int(v) for name, v in zip(others, values, strict=True)}
    return sums


def not_finite(tree: Any) -> list[str]:
    """Paths of the floating leaves of a tree that hold an infinity or something that is no number."""
    leaves = {name: leaf for name, leaf in _named(tree).items() if jnp.issubdtype(leaf.dtype, jnp.floating)}
    here, others = _split(leaves)
    found = {
        name: all(bool(np.isfinite(array[index]).all()) for index in array.pieces())
        for name, array in here.items()
    }
    if others:
        values = jax.device_get(_finite_on_devices(list(others.values())))
        found |= dict(zip(others, map(bool, values), strict=True))
    return [name for name in leaves if not found[name]]


def _named(tree: Any) -> dict[str, Any]:
    named, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in named}


def _split(leaves: Mapping[str, Any]) -> tuple[dict[str, LazyArray], dict[str, jax.Array]]:
    """Those of which host memory holds a whole copy, and those on devices."""
    here = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, LazyArray)}
    here |= {
        name: LazyArray.of(np.asarray(leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf))
        for name, leaf in leaves.items()
        if name not in here and _whole_on_host(leaf)
    }
    return here, {name: leaf for name, leaf in leaves.items() if name not in here}


def _whole_on_host(x: Any) -> bool:
    if not isinstance(x, jax.Array):
        return True
    return x.is_fully_replicated and all(device.platform == "cpu" for device in x.devices())


def _bits(x: jax.Array) -> Bits:
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _times_index(shape: tuple[int, ...], factor: int) -> Bits:
    """``factor`` times the index of every element in C order; made of its axes, so that no array moves."""
    result = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = factor * math.prod(shape[axis + 1 :]) % 2**32
        result += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
    return result


@jax.jit
def _stirred_on_devices(leaves: list[jax.Array]) -> tuple[UInt32[Array, " n"], Bool[Array, " n"]]:
    def one(x: jax.Array) -> UInt32[Array, ""]:
        mixed = _bits(x) + _times_index(x.shape, GOLDEN)
        for shift, factor in _ROUNDS:
            mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
        return jnp.sum(mixed ^ (mixed >> _LAST_SHIFT), dtype=jnp.uint32)

    def is_finite(x: jax.Array) -> Bool[Array, ""]:
        return jnp.isfinite(x).all() if jnp.issubdtype(x.dtype, jnp.floating) else jnp.bool_(True)

    return jnp.stack([one(x) for x in leaves]), jnp.stack([is_finite(x) for x in leaves])


def _stirred_on_host(array: LazyArray, *, at_once: bool = False) -> tuple[int, bool]:
    """The checksum, and whether all elements are finite.

    Args:
      at_once: it is in memory, and need not be read in pieces. Where it must, there may be no room for
        programs either.
    """
    total, offset, finite = 0, 0, True
    mixed, shifted = np.empty(_BLOCK, np.uint32), np.empty(_BLOCK, np.uint32)
    exponent = _EXPONENTS.get(array.dtype.name)
    floating = exponent is None and jnp.issubdtype(array.dtype, jnp.floating)
    for index in [(slice(None),) * len(array.shape)] if at_once else array.pieces():
        piece = array[index]
        if floating:
            finite = finite and bool(np.isfinite(piece).all())
        words = piece.reshape(-1).view(f"u{min(array.dtype.itemsize, 4)}")
        sum_, fine, done = _stirred_by_programs(words, offset, exponent or 0) if at_once else (0, True, 0)
        total, finite, offset = total + sum_, finite and fine, offset + done
        for start in range(done, words.size, _BLOCK):
            block = words[start : start + _BLOCK]
            x, t = mixed[: block.size], shifted[: block.size]
            if exponent is not None and finite and block.size:
                finite = int(np.bitwise_and(block, block.dtype.type(exponent), out=t).max()) != exponent
            np.add(_INDEX[: block.size], np.uint32(offset * GOLDEN % 2**32), out=x)
            np.add(x, block, out=x)
            for shift, factor in _ROUNDS:
                np.bitwise_xor(x, np.right_shift(x, np.uint32(shift), out=t), out=x)
                np.multiply(x, np.uint32(factor), out=x)
            np.bitwise_xor(x, np.right_shift(x, np.uint32(_LAST_SHIFT), out=t), out=x)
            total += int(x.sum(dtype=np.uint32))
            offset += block.size
    return total % 2**32, finite


def _stirred_by_programs(words: UInt[np.ndarray, " n"], offset: int, exponent: int) -> tuple[int, bool, int]:
    """The checksum of the words at the beginning, whether they are finite, and how many they are."""
    mesh, first, total, finite = _host_mesh(), 0, 0, True
    if mesh is None or words.size < min(_COMPILED, default=np.inf):
        return 0, True, 0
    with jax.set_mesh(mesh):  # whatever mesh the caller may have
        for size in _COMPILED:
            while words.size - first >= size:
                place = np.uint32((offset + first) % 2**32)
                sum_, fine = _stirred_in_lanes(words[first : first + size], place, exponent)
                # Each is waited for: programs under way hold copies of what they read.
                total, finite, first = total + int(sum_), finite and bool(fine), first + size
    return total, finite, first


@functools.cache
def _host_mesh() -> Mesh | None:
    """One CPU device, for which programs can be compiled; None where jax was told to leave CPUs out."""
    try:
        return Mesh(np.array(jax.local_devices(backend="cpu")[:1]), ("host",))
    except RuntimeError:
        return None


@functools.partial(jax.jit, static_argnames="exponent")
def _stirred_in_lanes(
    words: UInt[Array, " n"], offset: ArrayLike, exponent: int
) -> tuple[UInt32[Array, ""], Bool[Array, ""]]:
    """A part of a checksum, and whether its numbers are finite; read once, with nothing large beside it.

    Args:
      offset: how many words come before.
      exponent: the bits that are all set in a number that is not finite; 0: all are.
    """
    lanes = jax.lax.iota(jnp.uint32, _LANES) * jnp.uint32(GOLDEN)
    rows = words.reshape(-1, _LANES)

    def one(row: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        sums, highest = carry
        bits = jax.lax.dynamic_index_in_dim(rows, row, keepdims=False)
        first = (jnp.uint32(offset) + row.astype(jnp.uint32) * _LANES) * jnp.uint32(GOLDEN)
        mixed = bits.astype(jnp.uint32) + lanes + first
        for shift, factor in _ROUNDS:
            mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
        highest = jnp.maximum(highest, bits & jnp.asarray(exponent, bits.dtype))
        return sums + (mixed ^ (mixed >> _LAST_SHIFT)), highest

    begun = jnp.zeros(_LANES, jnp.uint32), jnp.zeros(_LANES, words.dtype)
    sums, highest = jax.lax.fori_loop(0, rows.shape[0], one, begun)
    return jnp.sum(sums, dtype=jnp.uint32), (highest != exponent).all() if exponent else jnp.bool_(True)


@jax.jit
def _weighted_on_devices(leaves: list[jax.Array]) -> UInt32[Array, " n"]:
    def one(x: jax.Array) -> UInt32[Array, ""]:
        return jnp.sum(_bits(x) * (_times_index(x.shape, 2) + jnp.uint32(1)), dtype=jnp.uint32)

    return jnp.stack([one(x) for x in leaves])


def _weighted_on_host(array: LazyArray) -> int:
    total = offset = 0
    for index in array.pieces():
        bits = array[index].reshape(-1).view(f"u{array.dtype.itemsize}").astype(np.uint32)
        weights = np.arange(0, 2 * bits.size, 2, dtype=np.uint32) + np.uint32((2 * offset + 1) % 2**32)
        total += int(np.multiply(bits, weights, out=bits).sum(dtype=np.uint32))
        offset += bits.size
    return total % 2**32


@jax.jit
def _finite_on_devices(leaves: list[jax.Array]) -> Array:
    return jnp.stack([jnp.isfinite(x).all() for x in leaves])
