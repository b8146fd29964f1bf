"""Published image processors, against recorded cases and by hand."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parity_processor import image_processor_outputs
from PIL import Image as PilImage

from vl_jax.data.images.pixels import (
    ImageProcessor,
    Resize,
    ViewConfig,
    as_tiling,
    load_image_processor,
    read_image_processor,
    shape_view,
)
from vl_jax.data.images.tiling import make_tiles

sizes = st.integers(1, 60)


def settings_of(kind: str, **values) -> dict:
    return {"image_processor_type": kind, **values}


def test_every_recorded_picture_of_the_published_image_processors(oracles):
    found = 0
    for file in sorted((oracles / "hf").glob("*/io.npz")):
        with np.load(file) as stored:
            names = [n for n in stored.files if n.startswith(("in_proc", "out_proc"))]
            arrays = {n: stored[n] for n in names}
        expected = {n: v for n, v in arrays.items() if n.startswith("out_proc")}
        outputs = image_processor_outputs(SimpleNamespace(arrays=arrays))
        assert outputs.keys() == expected.keys(), file
        for name, value in expected.items():
            np.testing.assert_allclose(outputs[name], value, rtol=0, atol=1e-5, err_msg=f"{file} {name}")
        found += len(expected)
    if not found:
        pytest.skip("no recorded image processors")


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, st.integers(1, 40), st.integers(1, 20))
def test_the_longer_side_becomes_the_size_and_no_side_is_below_the_least(height, width, edge, least):
    new = Resize(longest_edge=edge, min_size=least).size(height, width)
    assert max(new) == max(edge, least) and min(new) >= least
    exact = min(height, width) * edge / max(height, width)
    assert abs(min(new) - max(exact, least)) <= 0.5


@settings(max_examples=40, deadline=None)
@given(
    sizes,
    sizes,
    st.sampled_from(
        [
            {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 12}, "crop_size": 12},
            {"feature_extractor_type": "CLIPFeatureExtractor", "size": 12, "crop_size": 12},
            {"image_processor_type": "SiglipImageProcessorFast", "size": {"height": 12, "width": 12}},
        ]
    ),
)
def test_tiles_are_the_grey_levels_that_published_processors_of_pairs_make(height, width, said):
    (view,) = read_image_processor(said).views
    levels = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    tiles = make_tiles(PilImage.fromarray(levels), grid=(1, 1), config=as_tiling(view))
    np.testing.assert_array_equal(tiles, shape_view(levels, view)[None])


def test_sizes_round_halves_to_even():
    assert Resize(longest_edge=5).size(10, 5) == (5, 2)
    assert Resize(longest_edge=7).size(14, 7) == (7, 4)


def test_sizes_by_the_shorter_side_and_into_a_box():
    assert Resize(shortest_edge=10).size(20, 31) == (10, 15)
    assert Resize(shortest_edge=10, longest_edge=12).size(20, 31) == (8, 12)
    assert Resize(shortest_edge=10, longest_edge=99).size(31, 20) == (15, 10)
    assert Resize(max_height=10, max_width=30).size(20, 40) == (10, 20)
    assert Resize(height=3, width=4).size(9, 9) == (3, 4)


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, sizes, sizes)
def test_a_centred_crop_keeps_the_middle_and_is_black_outside(height, width, rows, columns):
    levels = np.arange(1, height * width * 3 + 1).reshape(height, width, 3) % 255 + 1
    view = ViewConfig(crop=(rows, columns), rescale=None)
    crop = ImageProcessor((view,))(levels.astype(np.uint8))["pixel_values"]
    assert crop.shape == (rows, columns, 3)
    kept = (crop > 0).all(-1)
    assert kept.sum() == min(rows, height) * min(columns, width)
    # The middle of the picture is the middle of the crop, up to one pixel that cannot be halved.
    row, column = np.argwhere(kept).mean(0)
    assert abs(row - (rows - 1) / 2) <= 0.5 and abs(column - (columns - 1) / 2) <= 0.5


def test_padding_has_the_colour_of_the_mean_and_surrounds_the_picture():
    kind = settings_of("DeepseekVLImageProcessor", size=8, min_size=1, image_mean=[0.1, 0.5, 0.999])
    view = read_image_processor({**kind, "do_rescale": False, "do_normalize": False})
    padded = view(np.zeros((2, 4, 3), np.uint8))["pixel_values"]
    assert padded.dtype == np.uint8 and (padded[:2] == (25, 127, 254)).all()
    assert (padded[2:6] == 0).all() and (padded[6:] == (25, 127, 254)).all()


def test_the_low_resolution_is_made_from_the_padded_high_resolution():
    levels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
    common = {"do_normalize": False, "do_rescale": False}
    hybrid = read_image_processor(
        settings_of("DeepseekVLHybridImageProcessor", size=16, high_res_size=32, **common)
    )(levels)
    high = hybrid["high_res_pixel_values"]
    alone = settings_of("DeepseekVLImageProcessor", **common)
    np.testing.assert_array_equal(read_image_processor({**alone, "size": 32})(levels)["pixel_values"], high)
    low = PilImage.fromarray(high).resize((16, 16), PilImage.Resampling.BICUBIC)
    np.testing.assert_array_equal(hybrid["pixel_values"], np.asarray(low))


def test_steps_are_left_out_when_asked():
    levels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    steps = ("do_resize", "do_rescale", "do_normalize", "do_pad", "do_center_crop")
    for kind in ("DeepseekVLImageProcessor", "LlavaImageProcessor", "SiglipImageProcessorFast"):
        bare = read_image_processor(settings_of(kind, **dict.fromkeys(steps, False)))
        np.testing.assert_array_equal(bare(levels)["pixel_values"], levels)


def test_pictures_become_rgb_unless_that_is_refused():
    clear = PilImage.new("RGBA", (4, 4), (0, 0, 0, 0))
    kind = settings_of("ViTImageProcessor", size=4, do_normalize=False)
    assert (read_image_processor(kind)(clear)["pixel_values"] == 1).all()  # white shows through
    with pytest.raises(ValueError, match="mode 'RGBA'"):
        read_image_processor({**kind, "do_convert_rgb": False})(clear)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_processor_type": "OtherImageProcessor"}, "image_processor_type='OtherImageProcessor'"),
        ({"size": {"height": 3}}, "size"),
        ({"size": {"longest_edge": 3}}, "longest edge alone"),
        ({"size": {"edge": 3}}, "cannot be read"),
        ({"size": -3}, "must be positive"),
        ({"resample": 9}, "resample=9"),
        ({"crop_size": 0}, "crop="),
        ({"image_processor_type": "DeepseekVLImageProcessor", "size": [3, 4]}, "must be the same"),
        ({"image_processor_type": "DeepseekVLImageProcessor", "min_size": 0}, "min_size=0"),
        ({"image_processor_type": "CLIPImageProcessor", "do_pad": True}, "do_pad=True"),
    ],
)
def test_bad_settings_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        read_image_processor({"image_processor_type": "LlavaImageProcessor", **values})


def test_views_need_names_of_their_own_and_sources_made_before():
    for views in ((ViewConfig(), ViewConfig()), (ViewConfig(made_from="later"),)):
        with pytest.raises(ValueError, match="pixel_values"):
            ImageProcessor(views)


def test_settings_come_from_a_checkpoint_folder(tmp_path):
    with pytest.raises(ValueError, match="no such file .*preprocessor_config.json"):
        load_image_processor(tmp_path)
    kind = settings_of("DeepseekVLHybridImageProcessor", image_mean=None)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(kind))
    assert load_image_processor(tmp_path) == read_image_processor(kind)
    high, low = load_image_processor(tmp_path).views
    assert (high.resize.longest_edge, low.resize.longest_edge, low.padding_colour) == (
        1024,
        384,
        (122, 116, 104),
    )
