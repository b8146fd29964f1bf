"""The operations that a model needs for what a batch holds: padding counts nothing.

    need = of_stage(experiment, stage)
    need.of(batch)      forwards, for the tokens, targets and tiles that are there

Attention grows with the square of a sample's tokens, all else with their number, and an encoder with the
tiles. How much each counts follows from the forward pass at four sizes, counted and not computed. Experts
count by the rows that a router gives them. What is neither tile nor token, such as waves, counts by the row.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from vl_jax.batch import FIELDS, TILES, Batch, without
from vl_jax.experiment import Experiment, example_batch, model_spec
from vl_jax.fit.flops import countable, forward_flops
from vl_jax.layout import plan_layout
from vl_jax.sharding import MeshConfig, make_mesh
from vl_jax.train.stages import Stage


@dataclasses.dataclass(frozen=True)
class Need:
    """Operations of the forward pass, for one of each."""

    row: float
    token: float  # with its share of the targets
    pair: float  # of tokens of one sample
    tile: float  # with its visual tokens, where these stand beside the sequence
    tile_tokens: int

    def of(self, batch: Batch) -> float:
        """Of a batch on the host."""
        segments = np.asarray(batch.segment_ids)
        lengths = [np.bincount(row[row > 0]) for row in segments]
        tokens = sum(int(of.sum()) for of in lengths)
        pairs = sum(int(np.square(of).sum()) for of in lengths)
        counts = (segments.shape[0], tokens, pairs, tiles_used(batch, self.tile_tokens))
        return float(np.dot((self.row, self.token, self.pair, self.tile), counts))


def tiles_used(batch: Batch, tile_tokens: int) -> int:
    """The tiles of a batch that a visual token comes from."""
    index, (rows, tiles) = np.asarray(batch.visual_index), batch.tiles.shape[:2]
    used = np.zeros((rows, tiles), bool)
    row, place = np.nonzero((index >= 0) & (index < tiles * tile_tokens))
    used[row, index[row, place] // tile_tokens] = True
    return int(used.sum())


def of_stage(experiment: Experiment, stage: Stage) -> Need:
    """What the model of an experiment needs in a stage; traced for one device, on every platform."""
    mesh = make_mesh(MeshConfig(1, 1, 1, 1), jax.local_devices()[:1])
    example = example_batch(experiment, 1)
    layout = plan_layout(countable(experiment.model), example, mesh)
    side = model_spec(experiment).tile_tokens_side

    def needed(batch: Batch) -> float:
        return forward_flops(layout, stage, batch) / stage.batch_size

    tiles, length, tile = example.tiles.shape[1], example.tokens.shape[1], 0.0
    if tiles:
        whole, example = needed(example), without(example, (TILES,))
        tile = (whole - needed(example)) / tiles
    sizes = sorted({length, length // 2, length // 4} - {0})
    if len(sizes) < 3:
        return Need(needed(example), 0.0, 0.0, tile, side * side)
    found = [needed(_shortened(example, size / length)) for size in sizes]
    # Exactly a polynomial: as many sizes as it has terms.
    pair, token, row = np.linalg.solve(np.vander(np.array(sizes, float), 3), found)
    return Need(float(row), float(token), float(pair), tile, side * side)


def _shortened(batch: Batch, share: float) -> Batch:
    """The batch with a share of its tokens, and of its targets; what stands there is not looked at."""
    cut = {}
    for name, field in FIELDS.items():
        if field.axes and field.axes[0] in ("T", "Q"):
            array = getattr(batch, name)
            cut[name] = array[:, : round(share * array.shape[1])]
    return dataclasses.replace(batch, **cut)
