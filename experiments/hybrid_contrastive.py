"""Contrastive training of the hybrid encoder: photographs, drawings and scenes, in English and Chinese.

    python -m vl_jax train --config=experiments/hybrid_contrastive.py --workdir=runs/hybrid_contrastive
    python -m vl_jax train --config=experiments/hybrid_contrastive.py:miniature --workdir=runs/miniature

The first of three stages of the encoder: it learns what pictures and texts have in common, and its experts
with it. Of four samples three are natural (photographs of ``flickr8k_bilingual``, twice as often as drawings
of ``twemoji_bilingual``) and one is synthetic. Beside a text of which words can be exchanged stands a wrong
one, and of the other texts of a batch the harder ones count more. ``miniature`` shows that all of it runs.
"""

import dataclasses

from vl_jax import config
from vl_jax.data.config import ConversationConfig, DataConfig
from vl_jax.data.images.augment import AugmentationConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sources.llava import LlavaConfig
from vl_jax.data.sources.negatives import NegativesConfig
from vl_jax.data.sources.scenes import ScenesConfig, SceneTextsConfig
from vl_jax.encoders.hybrid import HybridConfig
from vl_jax.encoders.resnet import ResNetConfig
from vl_jax.encoders.text import TextEncoderConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.evaluate.tasks.retrieval import Retrieval
from vl_jax.experiment import Experiment
from vl_jax.heads.pairs import Pairs
from vl_jax.joint import JointConfig, Tower
from vl_jax.moe.config import GateConfig
from vl_jax.moe.routing import MoEConfig
from vl_jax.train.loop import LoopConfig
from vl_jax.train.objectives.contrastive import ContrastivePairs
from vl_jax.train.optimizer import OptimizerConfig
from vl_jax.train.stages import Stage

SIDE, TOKENS = 96, 48
# Natural to synthetic is three to one.
MIXTURE = {"photographs": 2.0, "drawings": 1.0, "scenes": 1.0}
EXPERTS = MoEConfig(
    scheme="loss_free", num_experts=8, top_k=2, expert_dim=128, gates=GateConfig(normalize=True)
)
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
    moe=EXPERTS,
    sparse_layers=(2,),
)
TEXT = TextEncoderConfig(
    vocab_size=2048,
    max_length=64,
    embed_dim=128,
    mlp_dim=384,
    num_layers=2,
    num_heads=4,
    activation="gelu_tanh",
    causal=False,
    projection_dim=0,
)
RATE = OptimizerConfig(
    method="muon", learning_rate=1e-3, warmup_steps=30, final_fraction=0.03, weight_decay=0.1
)


def get_config(name: str = "full"):
    """The experiment of that name."""
    return config.view(config.choose(name, full, miniature))


def full():
    """300 steps of 128 pairs."""
    return Experiment(
        name="hybrid_contrastive",
        model=JointConfig(
            towers=(Tower("image", ENCODER), Tower("text", TEXT, "tokens")),
            heads=(Pairs(dim=128, identity="image"),),
        ),
        data=DataConfig(
            root="../shared/data",
            sources=(
                _pairs("photographs", "flickr8k_bilingual/train.json"),
                _pairs("drawings", "twemoji_bilingual/train.json"),
                _scenes("scenes", seed=1, num_examples=100_000),
            ),
            evaluation=(
                _pairs("held_out_photographs", "flickr8k_bilingual/val.json"),
                _pairs("held_out_drawings", "twemoji_bilingual/val.json"),
                _scenes("held_out_scenes", seed=2, num_examples=256),
            ),
            max_tokens=TOKENS,
            conversation=ConversationConfig(negatives=NegativesConfig()),
            augmentation=AugmentationConfig(brightness=0.2, contrast=0.2, crop=0.3),
            tiling=TilingConfig(tile_size=SIDE, views="global"),
        ),
        stages=(
            Stage(
                "pairs",
                steps=300,
                batch_size=128,
                sources=tuple(MIXTURE),
                weights=tuple(MIXTURE.values()),
                objective=ContrastivePairs(hardness=0.25, negatives=True),
                optimizer=RATE,
            ),
        ),
        loop=LoopConfig(log_every=10, routing_every=50, checkpoint_every=500),
        evaluation=EvaluationConfig(task=Retrieval(), batch_size=64),
    )


def miniature():
    """The same with half the width and pictures of 32 pixels: to see that all of it runs."""
    found = full()
    trunk = dataclasses.replace(ENCODER.trunk, stem_dim=8, stage_dims=(8, 16, 32), image_size=32)
    experts = dataclasses.replace(EXPERTS, num_experts=4, expert_dim=32)
    image = dataclasses.replace(
        ENCODER,
        trunk=trunk,
        embed_dim=32,
        mlp_dim=64,
        num_layers=2,
        num_heads=2,
        moe=experts,
        sparse_layers=(1,),
    )
    text = dataclasses.replace(TEXT, embed_dim=32, mlp_dim=64, num_layers=1, num_heads=2)
    (stage,), rate = found.stages, dataclasses.replace(RATE, learning_rate=3e-3, warmup_steps=5)
    return dataclasses.replace(
        found,
        name="hybrid_contrastive_miniature",
        model=JointConfig(
            towers=(Tower("image", image), Tower("text", text, "tokens")),
            heads=(Pairs(dim=32, identity="image"),),
        ),
        data=dataclasses.replace(found.data, tiling=TilingConfig(tile_size=32, views="global")),
        stages=(dataclasses.replace(stage, steps=40, batch_size=32, optimizer=rate),),
        evaluation=EvaluationConfig(task=Retrieval(), batch_size=64, limit=128),
    )


def _pairs(name, file):
    return LlavaConfig(name, file, labels=("image",), caption=True)


def _scenes(name, *, seed, num_examples):
    scenes = ScenesConfig(
        "drawn", num_examples, seed, image_size=SIDE, min_objects=2, max_objects=3, word_rate=0.0
    )
    return SceneTextsConfig(name, scenes, pictures=True, negatives=True)
