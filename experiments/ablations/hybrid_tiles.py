"""The hybrid encoder against a pure transformer on photographs: kinds of defect on magnetic tiles.

    python -m vl_jax sweep --config=ablations/hybrid_tiles --sweep=hybrid_tiles --workdir=runs/hybrid_tiles \\
        --config.data.root=../shared/data/magnetic_tile

As ``ablations/hybrid``, with a head of classes behind the encoder instead of a decoder: nearly all operations
are those of the encoder. ``ablations/hybrid_tiles:4`` is four times as long.
"""

from vl_jax import config
from vl_jax.ablation import miniature
from vl_jax.ablation.plan import Ablation, Arm, Claim
from vl_jax.data.config import DataConfig
from vl_jax.data.images.augment import AugmentationConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sources.records import RecordsConfig
from vl_jax.encoders.hybrid import HybridConfig
from vl_jax.encoders.resnet import ResNetConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.evaluate.tasks.labels import Labels
from vl_jax.heads.classification import Classification
from vl_jax.joint import JointConfig, Tower
from vl_jax.train.objectives.heads import Heads

SIDE = 64
RIGHT = "val: balanced_accuracy"
_ENCODER = "model.towers.image.encoder"
_RATE = "stages.classify.optimizer.learning_rate"
DEFECTS = ("free", "blowhole", "break", "crack", "fray", "uneven")
_HYBRID = HybridConfig(
    trunk=ResNetConfig(
        stem_dim=16,
        stage_dims=(16, 32, 64),
        stage_blocks=(1, 1, 1),
        block="basic",
        statistics="moving",
        image_size=SIDE,
        pixel_mean=(0.5,) * 3,
        pixel_std=(0.25,) * 3,
    ),
    embed_dim=96,
    mlp_dim=192,
    num_layers=2,
    num_heads=4,
)


def _vit(layers: int) -> dict:
    encoder = {"image_size": SIDE, "patch_size": 16, "embed_dim": 96, "mlp_dim": 192, "num_layers": layers}
    levels = {"num_heads": 4, "pixel_mean": 0.5, "pixel_std": 0.25}
    return {_ENCODER: "ViTConfig"} | {
        f"{_ENCODER}.{name}": value for name, value in (encoder | levels).items()
    }


def _experts() -> dict:
    of = {"num_experts": 4, "top_k": 2, "expert_dim": 64, "balance.weight": 1e-2, "balance.scope": "batch"}
    moe = {f"{_ENCODER}.moe.{name}": value for name, value in of.items()}
    return {f"{_ENCODER}.moe": "MoEConfig", **moe, f"{_ENCODER}.sparse_layers": "(1,)"}


def ablation_hybrid_tiles():
    """A pure transformer of 4 or 13 blocks; a trunk and two blocks; the same with experts in the last."""
    return Ablation(
        arms=(
            Arm("vit_4", _vit(4)),
            Arm("vit_13", _vit(13)),
            Arm("hybrid", {f"{_ENCODER}.num_layers": 2}),
            Arm("hybrid_sparse", _experts()),
        ),
        metric=RIGHT,
        better="higher",
        claims=(
            Claim(
                *("hybrid", "vit_13", RIGHT, "not_lower"),
                margin=0.05,
                says="as good as a pure transformer (an article on DeepSeek-VL, which gives no evidence)",
            ),
            Claim(*("hybrid", "vit_13", "flops", "lower"), says="for 53 % less compute (the same)"),
            Claim(*("hybrid", "vit_4", RIGHT, "open"), says="which depth of a pure transformer is as good"),
            Claim(
                *("hybrid_sparse", "hybrid", RIGHT, "open"),
                says="sparse blocks need more pictures than these 723 (V-MoE, arXiv 2106.05974, section 3)",
            ),
        ),
        tuning=({_RATE: 2e-3}, {_RATE: 1e-3}),
        equal=("steps", "samples", "tokens"),
        columns=("flops", "active_parameters"),
        says="Does an encoder with convolutions in front need less compute at equal quality, on photographs?",
    )


def get_config(scale: str = "1"):
    """The experiment, ``scale`` times as long."""

    def records(name: str, file: str) -> RecordsConfig:
        return RecordsConfig(name, file, image="image", labels=("label",))

    return config.view(
        miniature.experiment(
            scale,
            model=JointConfig((Tower("image", _HYBRID),), (Classification(DEFECTS),)),
            data=DataConfig(
                root="../shared/data/magnetic_tile",
                sources=(records("train", "train.json"),),
                evaluation=(records("val", "val.json"),),
                max_tokens=8,
                augmentation=AugmentationConfig(brightness=0.2, contrast=0.2, crop=0.3),
                tiling=TilingConfig(tile_size=SIDE, views="global"),
            ),
            stages=(miniature.stage("classify", scale, steps=200, batch_size=32, objective=Heads()),),
            evaluation=EvaluationConfig(task=Labels(headline="balanced_accuracy"), batch_size=64),
        )
    )
