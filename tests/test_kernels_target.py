"""A kernel is built for the device a program is for, and devices without kernels are named."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from vl_jax.kernels.target import MIB, Target, current_target, target_of
from vl_jax.kernels.tiles import Tiles, choose_tiles


def test_a_cpu_interprets():
    assert current_target().interpret is True
    with jax.set_mesh(jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))):
        assert jax.jit(lambda: current_target().vector_memory)() == current_target().vector_memory


def test_the_mesh_says_what_is_compiled_for():
    device = jax.sharding.AbstractDevice("TPU v5", 2, "tpu")
    mesh = jax.sharding.AbstractMesh(
        (1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=device
    )
    with jax.sharding.use_abstract_mesh(mesh):
        assert current_target() == Target(vector_memory=64 * MIB, cores=2)


def test_devices_without_kernels_are_named():
    with pytest.raises(ValueError, match="no kernels for 'NVIDIA H200'"):
        target_of("NVIDIA H200")


def choose(columns: int, target: Target) -> Tiles:
    """Tiles for 4096 x 1024 x columns, where every byte of an operand is moved once per tile that uses it."""
    return choose_tiles(
        4096,
        1024,
        columns,
        target,
        memory=lambda t: 4 * (t.rows * t.depth + t.depth * t.columns + t.rows * t.columns),
        traffic=lambda t: 4 * 4096 * 1024 * (columns // t.columns) + 4 * 1024 * columns * (4096 // t.rows),
        steps=lambda t: (4096 // t.rows) * (1024 // t.depth) * (columns // t.columns),
        parallel=lambda t: columns // t.columns,
    )


def test_tiles_fit_the_memory_and_keep_the_cores_busy():
    large, small = choose(1024, Target(vector_memory=64 * MIB)), choose(1024, Target(vector_memory=4 * MIB))
    assert large.columns == 1024 and small.columns < 1024
    assert 4 * (small.rows * small.depth + small.depth * small.columns) < 4 * MIB
    assert choose(1024, Target(vector_memory=64 * MIB, cores=2)).columns == 512


def test_widths_that_no_tile_has_are_refused():
    with pytest.raises(ValueError, match="multiples of 128"):
        choose(1000, Target())
