"""What ``benchmark windows`` counts, and what it says of the claim."""

from __future__ import annotations

import dataclasses
import json

import pytest

from vl_jax.benchmarks import windows
from vl_jax.encoders.swin import SwinConfig
from vl_jax.encoders.vit import ViTConfig

VIT = ViTConfig(image_size=32, patch_size=8, embed_dim=64, mlp_dim=128, num_layers=3, num_heads=2)
SWIN = SwinConfig(
    image_size=32, patch_size=4, embed_dim=32, stage_blocks=(2, 5), num_heads=(1, 2), window=4, mlp_ratio=2.0
)


def test_products_are_counted_for_every_layer():
    patches, width = 16, 64
    block = 4 * width**2 + 2 * width * 128 + 2 * patches * width  # projections, feed-forward, attention
    products = 2 * patches * (3 * block + 8 * 8 * 3 * width)
    assert windows.counted(VIT) == products
    stages = [(64, 32, 2), (16, 64, 5)]
    swin = sum(n * blocks * (8 * d**2 + 2 * 16 * d) for n, d, blocks in stages)
    swin += 64 * 4 * 4 * 3 * 32 + 16 * 128 * 64
    assert windows.counted(SWIN) == 2 * swin


def test_a_swin_costs_four_times_as_much_for_twice_the_side_and_a_vit_more():
    (swin, vit), (swin_2, vit_2) = (
        (
            windows.counted(dataclasses.replace(SWIN, image_size=side)),
            windows.counted(dataclasses.replace(VIT, image_size=side)),
        )
        for side in (128, 256)
    )
    assert swin_2 / swin == pytest.approx(4, rel=0.01) and vit_2 / vit > 6


def test_the_verdict_names_the_size_from_which_the_claim_holds():
    assert windows.verdict({"64": 1.1, "128": 0.6, "256": 0.7, "512": 0.5, "1024": 0.4}) == {
        "claim": "Swin features are 40 % cheaper than those of ViT",
        "verdict": "holds in part",
        "from": "512",
    }
    assert windows.verdict({"64": 0.7})["verdict"] == "does not hold"
    assert windows.verdict({"64": 0.6, "128": 0.5})["verdict"] == "holds"


@pytest.mark.slow
def test_the_benchmark_leaves_a_record_and_a_chart(tmp_path, capsys):
    case = windows.Curves(sides=(32, 64), timed=(32,), swin=SWIN, vit=VIT)
    found = windows.run(repeats=1, json_file=tmp_path / "windows.json", case=case)
    assert json.loads((tmp_path / "windows.json").read_text()) == found
    assert set(found["measured"]["32"]["swin"]) == {"flops", "cpu", "wall"}
    assert set(found["measured"]["64"]["ratio"]) == {"flops"}
    assert "<svg" in (tmp_path / "windows.svg").read_text() and "Swin beside ViT" in capsys.readouterr().out
    with pytest.raises(ValueError, match="repeats=0"):
        windows.run(repeats=0)
