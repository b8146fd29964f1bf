"""Tiling and the layout of visual tokens, against hand-drawn examples and the reference processor."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import processor_folder
from PIL import Image as PilImage

from vl_jax.data.images.tiling import (
    DEFAULT_GRIDS,
    TilingConfig,
    best_grid,
    layout,
    make_tiles,
    max_visual_tokens,
    num_views_tiles,
    num_visual_tokens,
    visual_sources,
)
from vl_jax.data.sample import FileImage


def gradient(width: int, height: int) -> PilImage.Image:
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return PilImage.fromarray(np.stack([x % 256, y % 256, (x + y) % 256], -1).astype(np.uint8))


def test_a_2x1_grid_with_two_tokens_a_side_reads_across_tiles():
    #  tile 5: 20 21   tile 6: 24 25   tile 7: 28 29     newline 40, separator 41
    #          22 23           26 27           30 31
    got = layout((2, 1), tile_tokens_side=2, views="global_local", first_tile=5, num_tiles=10)
    overview = [20, 21, 40, 22, 23, 40]
    mosaic = [24, 25, 28, 29, 40, 26, 27, 30, 31, 40]
    assert got.tolist() == [*overview, 41, *mosaic]


def test_the_global_view_alone_has_row_ends_and_no_separator():
    got = layout((3, 3), tile_tokens_side=2, views="global", first_tile=1, num_tiles=4)
    assert got.tolist() == [4, 5, 16, 6, 7, 16]


def test_the_local_view_may_be_read_first():
    options = {"tile_tokens_side": 2, "first_tile": 1, "num_tiles": 9}
    last = layout((2, 3), views="local_global", **options)
    first = layout((2, 3), views="global_local", **options)
    assert last.tolist() == [*first[7:], first[6], *first[:6]]
    for counted in (num_visual_tokens((2, 3), tile_tokens_side=2, views="local_global"), len(last)):
        assert counted == len(first)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(DEFAULT_GRIDS), st.integers(1, 5), st.integers(0, 3))
def test_every_token_of_every_tile_appears_exactly_once(grid, side, first):
    tiles = num_views_tiles(grid, "global_local")
    total = first + tiles + 1
    got = layout(grid, tile_tokens_side=side, views="global_local", first_tile=first, num_tiles=total)
    newline, separator = visual_sources(total, side * side)
    assert sorted(got[got < newline]) == list(range(first * side**2, (first + tiles) * side**2))
    assert (got == separator).sum() == 1 and (got == newline).sum() == side + grid[1] * side
    assert len(got) == num_visual_tokens(grid, tile_tokens_side=side, views="global_local")


def test_layout_puts_the_pixels_of_the_tiles_back_in_picture_order():
    # With one token a pixel, gathering tile pixels by the layout must rebuild the resized picture.
    config = TilingConfig(tile_size=4, candidates=((2, 3),))
    picture = gradient(8, 12)
    tiles = make_tiles(picture, grid=(2, 3), config=config)
    index = layout((2, 3), tile_tokens_side=4, views="global_local", first_tile=0, num_tiles=7)
    local = index[4 * 5 + 1 :].reshape(12, 9)[:, :-1]
    np.testing.assert_array_equal(tiles.reshape(-1, 3)[local], np.asarray(picture))


def test_published_token_counts():
    for grid, expected in {(1, 1): 421, (2, 2): 1023, (3, 3): 2017, (1, 9): 2101}.items():
        assert num_visual_tokens(grid, tile_tokens_side=14, views="global_local") == expected


def test_most_visual_tokens_of_a_row_cover_every_way_to_spend_its_tiles():
    config = TilingConfig(candidates=((1, 1), (1, 2), (2, 1)))

    def count(*grids):
        return sum(num_visual_tokens(g, tile_tokens_side=2, views="global_local") for g in grids)

    assert max_visual_tokens(config, tile_tokens_side=2, max_tiles=1) == 0
    assert max_visual_tokens(config, tile_tokens_side=2, max_tiles=3) == count((1, 2))
    assert max_visual_tokens(config, tile_tokens_side=2, max_tiles=4) == count((1, 1), (1, 1))
    whole = TilingConfig(views="global")
    assert max_visual_tokens(whole, tile_tokens_side=2, max_tiles=3) == 3 * 6


def test_small_images_get_the_smallest_grid_that_does_not_shrink_them():
    config = TilingConfig(tile_size=100)
    assert best_grid(50, 80, config) == (1, 1)
    assert best_grid(200, 100, config) == (2, 1)
    assert best_grid(100, 101, config) == (1, 2)


def test_many_images_are_not_tiled_and_the_global_view_needs_no_grid():
    assert best_grid(2000, 1000, TilingConfig(), num_images=2) == (4, 2)
    assert best_grid(2000, 1000, TilingConfig(), num_images=3) == (1, 1)
    assert best_grid(2000, 1000, TilingConfig(views="global")) == (1, 1)


def test_a_picture_is_centred_on_grey():
    tiles = make_tiles(
        PilImage.new("RGB", (8, 4)), grid=(1, 1), config=TilingConfig(tile_size=8, views="global")
    )
    assert (tiles[0, :2] == 127).all() and (tiles[0, 6:] == 127).all() and (tiles[0, 2:6] == 0).all()
    coloured = TilingConfig(tile_size=8, views="local_global", padding_colour=(1, 2, 3))
    both = make_tiles(PilImage.new("RGB", (8, 4)), grid=(1, 1), config=coloured)
    assert both.shape[0] == 2 and (both[:, :2] == (1, 2, 3)).all() and (both[:, 2:6] == 0).all()


def test_a_picture_may_be_cut_or_stretched_instead():
    halves = np.zeros((4, 16, 3), np.uint8)
    halves[:, 8:] = 255
    picture = PilImage.fromarray(halves)
    cut, stretched = (
        make_tiles(picture, grid=(2, 1), config=TilingConfig(tile_size=8, views="global_local", fit=fit))
        for fit in ("crop", "stretch")
    )
    # Whole: the middle of the picture, or all of it. In detail there are 16 x 8 pixels.
    assert (cut[0, :, :3] == 0).all() and (cut[0, :, 5:] == 255).all()
    assert (stretched[0, :, :3] == 0).all() and (stretched[0, :, 5:] == 255).all()
    assert cut.shape == stretched.shape == (3, 8, 8, 3)
    assert (stretched[1, :, :-2] == 0).all() and (stretched[2, :, 2:] == 255).all()


@pytest.mark.parametrize(
    "bad",
    [{"tile_size": 0}, {"candidates": ()}, {"candidates": ((0, 1),)}, {"padding_colour": (0, 0, 256)}],
)
def test_a_bad_field_is_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        TilingConfig(**bad)


def test_grids_of_the_reference_processor_folder(oracles):
    recorded = json.loads((processor_folder(oracles) / "best_resolution_384.json").read_text())
    assert tuple(map(tuple, recorded["candidates_grid_w_h"])) == DEFAULT_GRIDS
    wide = TilingConfig(candidates=tuple((w // 384, h // 384) for w, h in recorded["candidates_ext18"]))
    for case in recorded["cases"]:
        grid = best_grid(*case["size"], TilingConfig())
        assert [384 * n for n in grid] == case["best"]
        assert [384 * n for n in best_grid(*case["size"], wide)] == case["best_ext18"]
        count = num_visual_tokens(grid, tile_tokens_side=14, views="global_local")
        assert count == case["n_image_tokens"]


def test_pixels_of_the_reference_processor_folder(oracles):
    folder = processor_folder(oracles)
    settings_ = json.loads((folder / "processor_config.json").read_text())
    size = settings_["candidate_resolutions"][0][0]
    small = TilingConfig(
        tile_size=size,
        candidates=tuple((w // size, h // size) for w, h in settings_["candidate_resolutions"]),
    )
    checked = 0
    for case in json.loads((folder / "cases.json").read_text()):
        recorded = np.load(folder / "cases" / f"{case['name']}.npz")
        pictures = [FileImage(folder / "images" / f"{n}.png", n)() for n in case["images"]]
        if not pictures:
            continue
        config = small if recorded["images"].shape[-1] == size else TilingConfig()
        grids = [best_grid(*p.size, config, num_images=len(pictures)) for p in pictures]
        assert [list(g) for g in grids] == recorded["images_spatial_crop"].tolist()
        tiles = np.concatenate(
            [make_tiles(p, grid=g, config=config) for p, g in zip(pictures, grids, strict=True)]
        )
        expected = recorded["images"]
        if expected.dtype == np.uint8:
            np.testing.assert_array_equal(tiles.transpose(0, 3, 1, 2), expected)
        else:
            np.testing.assert_allclose((tiles / 255 - 0.5).transpose(0, 3, 1, 2) / 0.5, expected, atol=1e-6)
        checked += 1
    assert checked


@pytest.mark.parametrize("grid", [(2, 2), (3, 3), (1, 1), (2, 1)])
def test_a_quick_overview_is_nearly_the_same_and_the_tiles_are(grid):
    config = TilingConfig(tile_size=24, candidates=(grid,))
    across, down = np.meshgrid(np.linspace(0, 9, 80), np.linspace(0, 5, 40))
    waves = np.stack([127 + 90 * np.sin(across + k) * np.cos(down) for k in range(3)], -1)
    picture = PilImage.fromarray(waves.astype(np.uint8))
    exact, quick = (make_tiles(picture, grid=grid, config=config, quick=q) for q in (False, True))
    np.testing.assert_array_equal(exact[1:], quick[1:])
    assert np.abs(exact[0].astype(int) - quick[0]).mean() < (2 if grid[0] == grid[1] else 1e-9)
