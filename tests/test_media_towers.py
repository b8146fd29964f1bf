"""Joint models whose towers read media: what sources give reaches them, and what they lack is said."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vl_jax.data.config import DataConfig
from vl_jax.data.encode import make_encoder
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.media.series import SeriesConfig
from vl_jax.data.media.wave import WaveConfig
from vl_jax.data.sample import BadSample
from vl_jax.data.sources.build import RecordsConfig, SyntheticScenesConfig, open_source
from vl_jax.encoders.resnet import ResNetConfig
from vl_jax.encoders.series.lstm import LSTMConfig
from vl_jax.encoders.series.recurrent import RecurrentConfig
from vl_jax.encoders.series.tcn import TCNConfig
from vl_jax.encoders.vit import ViTConfig
from vl_jax.heads.classification import Classification
from vl_jax.joint import JointConfig, Tower

SCENES = SyntheticScenesConfig("scenes", image_size=16, motion=2, media=("depth", "flow"))
DEPTH = ViTConfig(
    image_size=16, patch_size=8, num_channels=1, embed_dim=8, mlp_dim=16, num_layers=1, num_heads=2
)
FLOW = ResNetConfig(
    stem_dim=4, stage_dims=(6,), stage_blocks=(1,), block="basic", image_size=16, num_channels=2
)
DATA = DataConfig(max_tokens=256, tiling=TilingConfig(tile_size=16, views="global"))


def encode(config: JointConfig, samples, data: DataConfig = DATA):
    encoder = make_encoder(data, config.spec())
    return encoder.collate([[encoder.example(sample)] for sample in samples])


def run(config: JointConfig, batch):
    model = config.build()
    variables = model.init(jax.random.key(0), config.smallest_batch(1), {}, method="initialize")
    return jax.jit(functools.partial(model.apply, variables))(batch, {})


@pytest.mark.slow
def test_depth_and_flow_of_a_scene_are_towers_of_their_own():
    towers = (Tower("near", DEPTH, "depth"), Tower("moving", FLOW, "flow"))
    config = JointConfig(towers, (Classification(("a", "b"), stream="near"),))
    source = open_source(SCENES)
    samples = [source[i] for i in range(2)]
    samples[1] = dataclasses.replace(samples[1], media={"flow": samples[1].media["flow"]})
    batch = encode(config, samples)
    depth, flow = batch.media["depth"], batch.media["flow"]
    np.testing.assert_array_equal(depth.values[0], samples[0].media["depth"]())
    np.testing.assert_array_equal(flow.values[1], samples[1].labels["flow"]()[..., :2])
    assert depth.present.tolist() == [True, False] and flow.present.all()
    streams = run(config, batch).streams
    assert streams["near"].tokens.shape == (2, 4, 8) and streams["moving"].tokens.shape == (2, 16, 6)
    assert streams["near"].mask.all(axis=1).tolist() == [True, False]


def test_scenes_without_motion_have_no_flow():
    with pytest.raises(ValueError, match="flow needs motion above 0"):
        SyntheticScenesConfig("scenes", media=("flow",))
    plain = open_source(dataclasses.replace(SCENES, motion=0, media=()))[0]
    assert plain.media == {}


@pytest.mark.slow
def test_records_of_series_reach_a_tower_with_their_lengths(tmp_path):
    records = [{"x": [[1, 2]] * n, "label": "a"} for n in (3, 9, 5)]
    records.append({"x": None, "label": "b"})
    (tmp_path / "data.json").write_text(json.dumps(records))
    source = open_source(
        RecordsConfig("s", "data.json", labels=("label",), media=(SeriesConfig("x"),)), root=str(tmp_path)
    )
    samples = [source[i] for i in range(len(source))]
    lstm = LSTMConfig(channels=2, max_length=6, recurrent=RecurrentConfig(4))
    tcn = TCNConfig(channels=2, max_length=6, embed_dim=4, num_levels=1)
    config = JointConfig(
        (Tower("first", lstm, "x"), Tower("second", tcn, "x")), (Classification(("a", "b"), stream="first"),)
    )
    batch = encode(config, samples)
    assert list(batch.media) == ["x"] and batch.media["x"].steps.tolist() == [3, 6, 5, 0]
    streams = run(config, batch).streams
    expected = jnp.arange(6) < jnp.array([[3], [6], [5], [0]])
    for name in ("first", "second"):
        np.testing.assert_array_equal(streams[name].mask, expected)
        assert not streams[name].pooled[3].any()


def test_a_medium_of_the_wrong_kind_is_a_finding_that_names_both_shapes(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([{"x": [[1, 2, 3]]}]))
    (sample,) = open_source(RecordsConfig("s", "data.json", media=(SeriesConfig("x"),)), root=str(tmp_path))
    config = JointConfig((Tower("t", TCNConfig(channels=2), "x"),), (Classification(("a", "b"), stream="t"),))
    with pytest.raises(BadSample, match=r"x has shape \(1, 3\), expected \(1024, 2\)") as caught:
        encode(config, [sample])
    assert caught.value.reason == "bad_media"


def test_media_that_no_tower_reads_are_never_opened(tmp_path):
    """A model without a tower for a medium trains on what is left, and touches no file of it."""
    (tmp_path / "data.json").write_text(json.dumps([{"x": "none.npy", "t": "a text"}]))
    config = RecordsConfig("s", "data.json", text="t", media=(SeriesConfig("x"),))
    (sample,) = open_source(config, root=str(tmp_path))
    model = JointConfig((Tower("near", DEPTH, "depth"),), (Classification(("a", "b"), stream="near"),))
    batch = encode(model, [sample])
    assert not batch.media["depth"].present.any()
    with pytest.raises(ValueError, match="field 'wave' is in no record"):
        open_source(dataclasses.replace(config, media=(WaveConfig("wave"),)), root=str(tmp_path))
