"""The hybrid encoder: a residual trunk, attention on its grid, experts in the last block; a head of classes.

    python -m vl_jax train --config=experiments/hybrid.py --workdir=runs/hybrid

Choices: ``magnetic_tile`` (six kinds of surface; this one if none is given) and ``clothing`` (ten kinds of
clothes). Published weights can begin the parts of an encoder of their size: a ResNet-18 the trunk, a ViT or
SigLIP the blocks. The article's full size, for ``model.towers.image.encoder``, is the default config with
experts in some blocks:

    --config.model.towers.image.encoder=HybridConfig --config.model.towers.image.encoder.norm_epsilon=1e-12
    --config.init_parts="(('image/trunk', 'resnet-18'), ('image/vit', 'vit-large-patch16-224'))"
"""

from vl_jax import config
from vl_jax.data.config import DataConfig
from vl_jax.data.images.augment import AugmentationConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sources.records import RecordsConfig
from vl_jax.encoders.hybrid import HybridConfig
from vl_jax.encoders.resnet import ResNetConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.evaluate.tasks.labels import Labels
from vl_jax.experiment import Experiment
from vl_jax.heads.classification import Classification
from vl_jax.joint import JointConfig, Tower
from vl_jax.moe.config import GateConfig
from vl_jax.moe.routing import MoEConfig
from vl_jax.train.loop import LoopConfig
from vl_jax.train.objectives.heads import Heads
from vl_jax.train.optimizer import OptimizerConfig
from vl_jax.train.stages import Stage

SIDE = 96
DEFECTS = ("free", "blowhole", "break", "crack", "fray", "uneven")
CLOTHES = ("dress", "hat", "longsleeve", "outwear", "pants", "shirt", "shoes", "shorts", "skirt", "t-shirt")
# A grid of 6 x 6 tokens of 16 x 16 pixels.
ENCODER = HybridConfig(
    trunk=ResNetConfig(
        stem_dim=16,
        stage_dims=(16, 32, 64),
        stage_blocks=(1, 1, 1),
        block="basic",
        statistics="moving",
        image_size=SIDE,
    ),
    embed_dim=128,
    mlp_dim=384,
    num_layers=3,
    num_heads=4,
    moe=MoEConfig(
        scheme="loss_free", num_experts=8, top_k=2, expert_dim=128, gates=GateConfig(normalize=True)
    ),
    sparse_layers=(2,),
)


def get_config(name: str = "magnetic_tile"):
    """The experiment of that name."""
    known = {"magnetic_tile": DEFECTS, "clothing": CLOTHES}
    if name not in known:
        raise ValueError(f"{name!r} is not one of {', '.join(known)}")

    def records(source: str, file: str) -> RecordsConfig:
        return RecordsConfig(source, file, image="image", labels=("label",))

    rate = OptimizerConfig(method="muon", learning_rate=1e-3, warmup_steps=30, final_fraction=0.03)
    return config.view(
        Experiment(
            name=f"hybrid_{name}",
            model=JointConfig((Tower("image", ENCODER),), (Classification(known[name]),)),
            data=DataConfig(
                root=f"../shared/data/{name}",
                sources=(records("train", "train.json"),),
                evaluation=(records("val", "val.json"),),
                max_tokens=8,
                augmentation=AugmentationConfig(brightness=0.2, contrast=0.2, crop=0.3),
                tiling=TilingConfig(tile_size=SIDE, views="global"),
            ),
            stages=(Stage("classify", steps=450, batch_size=32, objective=Heads(), optimizer=rate),),
            loop=LoopConfig(log_every=10, routing_every=50, checkpoint_every=500),
            evaluation=EvaluationConfig(task=Labels(), batch_size=64),
        )
    )
