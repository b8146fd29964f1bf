"""Lazy arrays: the pieces are the array's items, in order, and few bytes each."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vl_jax.runtime import lazy_array
from vl_jax.runtime.lazy_array import LazyArray


@given(
    shape=st.lists(st.integers(0, 7), max_size=5).map(tuple),
    dtype=st.sampled_from(["u1", "u2", "f4"]),
    limit=st.integers(4, 400),
)
@pytest.mark.slow
def test_pieces_are_the_items_in_order_and_none_is_large(shape, dtype, limit):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    lazy = LazyArray.of(array)
    given_limit = lazy_array.PIECE
    lazy_array.PIECE = limit
    try:
        pieces = [lazy[index] for index in lazy.pieces()]
    finally:
        lazy_array.PIECE = given_limit
    assert [item for piece in pieces for item in piece.reshape(-1)] == list(array.reshape(-1))
    assert all(piece.nbytes <= limit for piece in pieces)
    assert lazy.nbytes == array.nbytes
