"""The smallest run that has everything a kill can hurt: two stages, experts, checkpoints, an evaluation.

The folder of its pictures stands in ``VL_JAX_CHAOS_DATA``; see ``chaos.py``.
"""

import os

from vl_jax import config
from vl_jax.data.config import DataConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sources.records import RecordsConfig
from vl_jax.encoders.vit import ViTConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.evaluate.tasks.labels import Labels
from vl_jax.experiment import Experiment
from vl_jax.heads.classification import Classification
from vl_jax.joint import JointConfig, Tower
from vl_jax.moe.routing import MoEConfig
from vl_jax.train.best import BestConfig
from vl_jax.train.loop import LoopConfig
from vl_jax.train.objectives.heads import Heads
from vl_jax.train.stages import Stage

CLASSES = ("dark", "light")


def get_config():
    """Twenty steps; a checkpoint every third, an evaluation every fifth."""
    experts = MoEConfig(scheme="loss_free", num_experts=4, top_k=2, expert_dim=8)
    encoder = ViTConfig(
        image_size=8,
        patch_size=4,
        embed_dim=8,
        mlp_dim=16,
        num_layers=1,
        num_heads=2,
        moe=experts,
        sparse_layers=(0,),
    )
    source = RecordsConfig("train", "train.csv", image="image", labels=("label",))
    return config.view(
        Experiment(
            name="chaos",
            model=JointConfig(towers=(Tower("image", encoder),), heads=(Classification(CLASSES),)),
            data=DataConfig(
                root=os.environ["VL_JAX_CHAOS_DATA"],
                sources=(source,),
                evaluation=(RecordsConfig("held_out", "held_out.csv", image="image", labels=("label",)),),
                max_tokens=8,
                image_dropout_rate=0.1,
                tiling=TilingConfig(tile_size=8, views="global"),
            ),
            stages=(
                Stage("first", steps=8, batch_size=8, objective=Heads(), trainable=("label/.*",)),
                Stage("second", steps=12, batch_size=8, objective=Heads()),
            ),
            loop=LoopConfig(
                log_every=1,
                routing_every=2,
                checkpoint_every=3,
                evaluate_every=5,
                best=BestConfig(keep=1, score="held_out/loss", order="lowest"),
            ),
            evaluation=EvaluationConfig(task=Labels(), batch_size=8),
        )
    )
