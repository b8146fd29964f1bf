"""Small shapes, seen as a whole or in tiles: does a closer look help, and how close should it be?

    python -m vl_jax sweep --config=ablations/tiling --sweep=tiling --workdir=runs/tiling

Pictures have 64 pixels, tiles 32. ``ablations/tiling:4`` is four times as long.
"""

from vl_jax import config
from vl_jax.ablation import miniature
from vl_jax.ablation.miniature import LOSS, SIDE
from vl_jax.ablation.plan import Ablation, Arm, Claim
from vl_jax.data.images.tiling import TilingConfig

_TILING = "data.tiling"


def ablation_tiling():
    """The whole alone; the same once more in its place for a tile; two tiles; four, which lose no pixel."""
    return Ablation(
        arms=(
            Arm("whole", {f"{_TILING}.views": "global"}),
            Arm("whole_twice", {f"{_TILING}.candidates": "((1, 1),)"}),
            Arm("two_tiles", {f"{_TILING}.candidates": "((2, 1),)"}),
            Arm("four_tiles", {f"{_TILING}.candidates": "((2, 2),)"}),
        ),
        metric=LOSS,
        better="lower",
        claims=(
            Claim(
                *("four_tiles", "whole", LOSS, "lower"),
                says="tiles of the full picture help where things are small (LLaVA-NeXT; DeepSeek-VL2, arXiv "
                "2412.10302, section 2, shows no ablation)",
            ),
            Claim("four_tiles", "two_tiles", LOSS, "open", says="more tiles are better"),
            Claim(
                *("whole_twice", "whole", LOSS, "open"),
                says="more tokens without more detail: what of the gain is not resolution",
            ),
        ),
        equal=("steps", "tokens", "parameters"),
        says="Does it help to look closer, and is it the detail or only that there are more tokens?",
    )


def _small(name: str, seed: int, num_examples: int = 1_000_000):
    """One to three small objects on nine places; 21 pixels each, ten in the overview."""
    kinds = ("shape", "colour", "position")
    return miniature.scenes(
        *(name, seed, num_examples), image_size=2 * SIDE, grid=3, max_objects=3, num_shapes=6, kinds=kinds
    )


def get_config(scale: str = "1"):
    """The experiment, ``scale`` times as long."""
    return config.view(
        miniature.experiment(
            scale,
            data=miniature.data(
                sources=(_small("train", 1),),
                evaluation=(_small("heldout", 2, num_examples=256),),
                max_tokens=88,
                max_tiles=5,
                tiling=TilingConfig(tile_size=SIDE, candidates=((2, 2),)),
            ),
        )
    )
