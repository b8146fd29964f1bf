"""Stages as data: which leaves train, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from vl_jax.train.stages import Stage, trainable_paths, trainable_table

PARAMS = {
    "encoder": {"stem": {"kernel": np.zeros((2, 3))}, "blocks": {"kernel": np.zeros(4)}},
    "adapter": {"newline": np.zeros(5)},
    "language": {"layers": {"gate": {"kernel": np.zeros(7)}, "mlp": np.zeros(11)}},
}


def stage(*patterns: str, **options) -> Stage:
    return Stage("align", steps=1, trainable=patterns, **options)


def test_patterns_select_whole_paths():
    found = trainable_paths(stage("adapter/.*", ".*/gate/.*"), PARAMS)
    assert found == {"adapter/newline", "language/layers/gate/kernel"}


def test_by_default_everything_trains():
    assert len(trainable_paths(Stage("all", steps=1), PARAMS)) == 5


def test_the_table_counts_parameters_and_those_that_train_by_module():
    assert trainable_table(stage("encoder/stem/.*", ".*/gate/.*"), PARAMS, {}) == [
        ("encoder/stem", 6, 6),
        ("encoder/blocks", 4, 0),
        ("adapter/newline", 5, 0),
        ("language/layers", 18, 7),
    ]


def test_a_pattern_that_matches_nothing_names_the_stage():
    message = (
        "config.stages.align.trainable: pattern 'encodr/.*' matches no parameter; top-level names: adapter"
    )
    with pytest.raises(ValueError, match=message):
        trainable_paths(stage("encodr/.*"), PARAMS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0, batch_size=64, accumulation=1: each must be >= 1"),
        (
            {"steps": 1, "batch_size": 6, "accumulation": 4},
            "batch_size=6 is not a multiple of accumulation=4",
        ),
        ({"steps": 1, "sources": ("a", "b"), "weights": (1.0,)}, "1 weights for 2 sources"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Stage("align", **options)
