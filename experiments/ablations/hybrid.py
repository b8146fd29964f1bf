"""What convolutions before the blocks of an encoder save, and what experts in it bring: spatial questions.

    python -m vl_jax sweep --config=ablations/hybrid --sweep=hybrid --workdir=runs/hybrid

Scenes of 64 x 64 pixels are asked where things are, and on which side of another. Every encoder makes a grid
of 4 x 4 tokens of 16 x 16 pixels; the decoder behind it is the same. The pure transformer is there in three
depths, so that a hybrid can be set against the one that is as good. Every arm is tuned with the same two
learning rates. ``ablations/hybrid:4`` is four times as long. What an encoder costs for one picture is said by
``vl_jax.ablation.budget.encoder_cost``. ``ablations/hybrid_tiles`` asks the same of photographs.
"""

import dataclasses

from vl_jax import config
from vl_jax.ablation import miniature
from vl_jax.ablation.plan import Ablation, Arm, Claim
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.encoders.hybrid import HybridConfig
from vl_jax.encoders.resnet import ResNetConfig
from vl_jax.evaluate.runner import EvaluationConfig

SIDE = 64
RIGHT = "heldout: exact_match"
_MODEL = "model.encoder"
_RATE = "stages.train.optimizer.learning_rate"
_HYBRID = HybridConfig(
    trunk=ResNetConfig(
        stem_dim=8,
        stage_dims=(8, 16, 32),
        stage_blocks=(1, 1, 1),
        block="basic",
        statistics="moving",
        image_size=SIDE,
        pixel_mean=(0.9,) * 3,  # scenes are mostly light background
        pixel_std=(0.3,) * 3,
    ),
    embed_dim=48,
    mlp_dim=96,
    num_layers=2,
    num_heads=2,
)


def _vit(layers: int) -> dict:
    encoder = {"image_size": SIDE, "patch_size": 16, "embed_dim": 48, "mlp_dim": 96, "num_layers": layers}
    fields = {**encoder, "num_heads": 2, "pixel_mean": 0.9, "pixel_std": 0.3}
    return {_MODEL: "ViTConfig"} | {f"{_MODEL}.{name}": value for name, value in fields.items()}


def _experts() -> dict:
    """Four experts, two for each cell, each half as wide as the block that they take the place of."""
    of = {"num_experts": 4, "top_k": 2, "expert_dim": 32, "balance.weight": 1e-2, "balance.scope": "batch"}
    moe = {f"{_MODEL}.moe.{name}": value for name, value in of.items()}
    return {f"{_MODEL}.moe": "MoEConfig", **moe, f"{_MODEL}.sparse_layers": "(1,)"}


def ablation_hybrid():
    """A pure transformer of 4, 8 or 16 blocks; a trunk and two blocks; the same with experts in the last."""
    return Ablation(
        arms=(
            Arm("vit_4", _vit(4)),
            Arm("vit_8", _vit(8)),
            Arm("vit_16", _vit(16)),
            Arm("hybrid", {f"{_MODEL}.num_layers": 2}),
            Arm("hybrid_sparse", _experts()),
        ),
        metric=RIGHT,
        better="higher",
        claims=(
            Claim(
                *("hybrid", "vit_16", RIGHT, "not_lower"),
                margin=0.03,
                says="as good as a pure transformer, spatial relations kept (an article on DeepSeek-VL, "
                "which gives no evidence)",
            ),
            Claim(
                *("hybrid", "vit_16", "flops", "lower"),
                says="for 53 % less compute (the same). This encoder has 54 % fewer multiplications than "
                "that; the operations here are of the whole model",
            ),
            Claim(
                *("hybrid", "vit_4", RIGHT, "higher"),
                says="convolutions before few blocks see better than patches alone (Xiao et al. 2021, arXiv "
                "2106.14881, section 5)",
            ),
            Claim(
                *("hybrid_sparse", "hybrid", RIGHT, "higher"),
                says="sparse blocks are better for the same work (V-MoE, arXiv 2106.05974, section 3)",
            ),
            Claim(*("hybrid", "vit_8", RIGHT, "open"), says="which depth of a pure transformer is as good"),
        ),
        tuning=({_RATE: 4e-3}, {_RATE: 2e-3}),
        equal=("steps", "samples", "tokens"),
        columns=("flops", "active_parameters"),
        says="Does an encoder with convolutions in front need less compute at equal quality?",
    )


def get_config(scale: str = "1"):
    """The experiment, ``scale`` times as long."""
    options = {"image_size": SIDE, "min_objects": 2, "kinds": ("position", "relation", "relation")}
    return config.view(
        miniature.experiment(
            scale,
            model=dataclasses.replace(miniature.MODEL, encoder=_HYBRID),
            data=miniature.data(
                sources=(miniature.scenes("train", 1, **options),),
                evaluation=(miniature.scenes("heldout", 2, num_examples=256, **options),),
                tiling=TilingConfig(tile_size=SIDE, views="global"),
            ),
            stages=(miniature.stage("train", scale, steps=400),),
            evaluation=EvaluationConfig(batch_size=64, per_sample=2, max_new_tokens=8),
        )
    )
