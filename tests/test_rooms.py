"""Rooms of an exchange: what is planned covers even load, has no number of devices in it, and is said."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vl_jax.moe.bounded import rooms
from vl_jax.moe.bounded.rooms import Traffic

LARGE = Traffic(tokens=4096, top_k=8, num_experts=256, shards=256)


@pytest.mark.parametrize(
    ("shards", "num_experts", "top_k"), [(1, 4, 2), (2, 6, 2), (3, 6, 3), (4, 4, 2), (2, 8, 1)]
)
def test_the_mean_number_of_destinations_is_that_of_all_choices(shards, num_experts, top_k):
    each = num_experts // shards
    found = [len({e // each for e in chosen}) for chosen in itertools.combinations(range(num_experts), top_k)]
    assert rooms.destinations(shards, num_experts, top_k) == pytest.approx(np.mean(found))


def test_rooms_of_a_layer_at_pod_scale_worked_by_hand():
    (hop,) = rooms.plan(LARGE)
    assert LARGE.num_chunks == 8 and hop.tokens == 512  # one expert a device: 32768 rows, 4096 at a time
    assert (hop.sent, hop.received, hop.pairs) == (512 * 8, 512 * 8 * 5 // 4, 512 * 8 * 5 // 4)
    memory = rooms.memory(LARGE, width=7168, hidden=2048)
    assert memory.balanced == 4096 * 8 * 7168 * 2 and memory.total <= 3 * memory.balanced
    text = rooms.describe(LARGE, width=7168, hidden=2048)
    assert "among 256 devices: room for 4096 rows out, 5120 in, 5120 in the experts" in text
    assert "448 MiB of rows arrive at even load" in text


def test_a_token_goes_once_to_every_slice_and_from_there_to_its_devices():
    outer, inner = rooms.plan(Traffic(tokens=64, top_k=8, num_experts=256, shards=64, slices=4, chunks=1))
    assert (outer.shards, outer.experts, inner.shards, inner.experts) == (4, 64, 16, 4)
    mean = float(rooms.destinations(4, 256, 8))
    assert outer.sent == min(math.ceil(1.25 * 64 * mean), 64 * 4) and inner.tokens == outer.received
    limited = Traffic(tokens=64, top_k=8, num_experts=256, shards=64, slices=4, chunks=1, most_slices=2)
    assert rooms.plan(limited)[0].sent == 64 * 2 < outer.sent


traffics = st.builds(
    lambda tokens, top_k, each, slices, devices, chunks, factor, more: Traffic(
        tokens=tokens,
        top_k=min(top_k, each * slices * devices),
        num_experts=each * slices * devices,
        shards=slices * devices,
        slices=slices,
        chunks=chunks,
        factor=factor,
        most_choices=min(top_k + more, each * slices * devices),
    ),
    st.integers(1, 200),
    st.integers(1, 8),
    st.integers(1, 8),
    st.integers(1, 4),
    st.integers(1, 8),
    st.none() | st.integers(1, 9),
    st.sampled_from([1.0, 1.25, 2.0]),
    st.integers(0, 64),
)


@given(traffics)
def test_rooms_hold_one_token_and_no_more_than_could_come(traffic):
    hops, widest = rooms.plan(traffic), traffic.widest
    for hop in hops:
        assert hop.sent >= widest and hop.received >= 1 and hop.pairs >= min(widest, hop.experts)
        assert hop.received <= hop.tokens * hop.shards * min(widest, hop.shards)
        widest = min(widest, hop.experts)
    rows = math.ceil(traffic.tokens / traffic.num_chunks) * traffic.top_k
    assert hops[-1].pairs <= max(math.ceil(traffic.factor * rows), traffic.widest)
    assert 1 <= traffic.num_chunks <= traffic.tokens


@pytest.mark.parametrize("shards", [8, 64, 256, 2048])
def test_memory_does_not_grow_with_the_number_of_devices(shards):
    """At two experts a device, whatever the number of devices."""
    small = rooms.memory(Traffic(4096, 8, 16, 8), width=1024, hidden=512)
    found = rooms.memory(Traffic(4096, 8, 2 * shards, shards), width=1024, hidden=512)
    assert found.total <= 1.25 * small.total  # fewer experts of a token are on one device


def test_sizes_that_do_not_divide_are_named():
    with pytest.raises(ValueError, match="num_experts=6 must divide by the 4 devices"):
        Traffic(8, 2, 6, 4)
    with pytest.raises(ValueError, match="and these by slices=3"):
        Traffic(8, 2, 8, 4, slices=3)
