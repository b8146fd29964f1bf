"""One encoded sample: what a sample becomes before it is laid out in a row with others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from vl_jax.data.images.tiling import Grid


@dataclass(frozen=True)
class Example:
    """One encoded sample, unpadded; field meanings are those of ``Batch``, indices count from 0."""

    id: str
    tokens: np.ndarray  # i32[t]
    targets: np.ndarray  # i32[t]
    loss_weights: np.ndarray  # f32[t]
    positions: np.ndarray  # i32[t]
    branch_ids: np.ndarray  # i32[t]
    visual_slot: np.ndarray  # i32[t]
    tiles: np.ndarray  # u8[m h w c]
    visual_index: np.ndarray  # i32[s]
    visual_start: np.ndarray  # i32[s]
    num_turns: int = 1  # turns that fitted
    grids: tuple[Grid, ...] = ()  # of the local view of each image
    answer_runs: tuple[range, ...] = ()  # positions of the answers, their EOS included
    media: Mapping[str, np.ndarray] = field(default_factory=dict)  # inputs that the sample has, by name
    labels: Mapping[str, np.ndarray] = field(default_factory=dict)  # labels that the sample has, by name
