"""What a batch needs of a model: what is there counts, padding does not."""

from __future__ import annotations

import numpy as np
import pytest

from vl_jax.batch import blank
from vl_jax.fit.chips import CHIPS, peak_of
from vl_jax.fit.useful import Need, tiles_used

SIZES = {"T": 8, "Q": 8, "M": 3, "S": 12, "h": 4, "w": 4, "c": 3}


def test_tokens_pairs_and_tiles_by_hand():
    batch = blank(SIZES, 2)
    batch.segment_ids[0, :7] = [1, 1, 1, 2, 2, 2, 2]
    batch.segment_ids[1, :2] = 1
    batch.visual_index[0, :9] = [0, 1, 12, 2, 3, 8, 9, 13, 8]  # tiles 0 and 2; 12 and 13 are no tile's
    batch.visual_index[1, 0] = 4  # tile 1
    assert tiles_used(batch, 4) == 3
    assert Need(1000.0, 100.0, 10.0, 1.0, 4).of(batch) == 2 * 1000 + 9 * 100 + (9 + 16 + 4) * 10 + 3


def test_a_blank_batch_needs_nothing_but_its_rows():
    assert Need(0.0, 1.0, 1.0, 1.0, 4).of(blank(SIZES, 5)) == 0.0
    assert Need(2.0, 1.0, 1.0, 1.0, 4).of(blank(SIZES, 5)) == 10.0


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 2 * CHIPS["v4"].flops),
        ("TPU v5 lite", CHIPS["v5e"].flops),
        ("TPU v5", CHIPS["v5p"].flops),
        ("TPU v5p", CHIPS["v5p"].flops),
        ("TPU v6 lite", CHIPS["v6e"].flops),
        ("TPU7x", CHIPS["tpu7x"].flops),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", None),
        ("cpu", None),
    ],
)
def test_peaks_by_the_name_of_a_device(kind, peak):
    assert peak_of(kind) == peak


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart", "experiments/classification.py"])
def test_a_full_batch_needs_what_the_forward_pass_of_its_shapes_counts(name):
    pytest.importorskip("ml_collections")
    from vl_jax import experiment as experiments
    from vl_jax.fit import useful
    from vl_jax.fit.experiment import _flops

    experiment = experiments.load(name)
    stage, example = experiment.stages[-1], experiments.example_batch(experiment, 1)
    need = useful.of_stage(experiment, stage)
    length, tiles = example.tokens.shape[1], example.tiles.shape[1]
    whole = np.dot((need.row, need.token, need.pair, need.tile), (1, length, length**2, tiles))
    assert whole == pytest.approx(_flops(experiment, stage) / stage.batch_size, rel=1e-6)
    assert min(need.row, need.token, need.pair) >= -1.0 and need.tile > 0
