"""What the ablations of the package have in common: a tiny model, drawn scenes, and a run of some seconds.

    experiment()                       a decoder with experts that answers questions about scenes
    experiment(model=SEEING, ...)      the same with its experts in the encoder of pictures
    adapting(...)                      the decoder, which then learns something new by adapters

A file of ablations takes one of them, changes it with ``dataclasses.replace``, and declares its arms.
"""

from __future__ import annotations

import dataclasses

from vl_jax.data.config import ConversationConfig, DataConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sources.scenes import ScenesConfig
from vl_jax.encoders.adapter import AdapterConfig
from vl_jax.encoders.vit import ViTConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.evaluate.tasks.held_out_loss import HeldOutLoss
from vl_jax.experiment import Experiment
from vl_jax.language.decoder import DecoderConfig
from vl_jax.language.gqa import GQAConfig
from vl_jax.model import VisionLanguageConfig
from vl_jax.moe.config import BalanceConfig, GateConfig, SharedExpertsConfig
from vl_jax.moe.routing import MoEConfig
from vl_jax.nn.rope import RopeConfig
from vl_jax.train.loop import LoopConfig
from vl_jax.train.lora import LoraConfig
from vl_jax.train.optimizer import OptimizerConfig
from vl_jax.train.stages import Stage

STEPS, ROWS = 150, 16  # of a run, and of a batch
SIDE = 32  # pixels of a picture
# What arms have alike where a change costs nothing, and the figures that claims are about.
EQUAL = ("steps", "tokens", "parameters", "active_parameters", "flops")
LOSS, MAXVIO = "heldout: loss", "routing/maxvio_running_mean"
INFORMATION = "routing/mutual_information_mean"  # of experts and modalities

EXPERTS = MoEConfig(
    scheme="top_k",
    num_experts=8,
    top_k=2,
    expert_dim=32,
    shared=SharedExpertsConfig(num=0),
    gates=GateConfig(normalize=True),
    balance=BalanceConfig(weight=1e-2, scope="batch", bias_rate=1e-2),
)
ENCODER = ViTConfig(
    image_size=SIDE,
    patch_size=8,
    embed_dim=48,
    mlp_dim=96,
    num_layers=1,
    num_heads=2,
    pixel_mean=0.9,  # scenes are mostly light background
    pixel_std=0.3,
)
DECODER = DecoderConfig(
    vocab_size=2048,
    embed_dim=48,
    mlp_dim=64,  # of two experts
    num_layers=2,
    num_dense_layers=1,
    attention=GQAConfig(
        num_heads=2, num_kv_heads=2, head_dim=24, rope=RopeConfig(theta=100.0, pairs="adjacent")
    ),
)
MODEL = VisionLanguageConfig(
    encoder=ENCODER, adapter=AdapterConfig(num_layers=2), language=DECODER, moe=EXPERTS
)
# Experts in the encoder, which may look at all tokens of a picture at once; the decoder has none.
SEEING = dataclasses.replace(
    MODEL,
    encoder=dataclasses.replace(ENCODER, num_layers=2, moe=EXPERTS, sparse_layers=(1,)),
    language=dataclasses.replace(DECODER, num_dense_layers=2),
)
RATE = OptimizerConfig(learning_rate=4e-3, warmup_steps=15, final_fraction=0.05)


def scenes(name: str, seed: int, num_examples: int = 1_000_000, **options) -> ScenesConfig:
    """One or two large objects of a few colours and shapes, without words.

    Args:
      options: further fields of the source, in place of these.
    """
    easy = {"image_size": SIDE, "max_objects": 2, "grid": 2, "num_colours": 4, "num_shapes": 4}
    return ScenesConfig(
        name=name, seed=seed, num_examples=num_examples, **{**easy, "word_rate": 0.0, **options}
    )


def data(**options) -> DataConfig:
    """Scenes to learn from, and others that are held out; three questions of a scene at a time.

    Args:
      options: further fields of the config, in place of these.
    """
    fields = {
        "sources": (scenes("train", 1),),
        "evaluation": (scenes("heldout", 2, num_examples=256),),
        "max_tokens": 64,
        "max_answer_tokens": 12,
        "conversation": ConversationConfig(max_turns=3, turn_sampling="uniform"),
        "tiling": TilingConfig(tile_size=SIDE, views="global"),
    }
    return DataConfig(**{**fields, **options})


def stage(name: str, scale: str, *, steps: int = STEPS, **options) -> Stage:
    """A stage, ``scale`` times as long as it says.

    Args:
      options: further fields of the stage.
    """
    return Stage(
        name, **{"steps": round(steps * float(scale)), "batch_size": ROWS, "optimizer": RATE, **options}
    )


def experiment(scale: str = "1", **options) -> Experiment:
    """The experiment, ``scale`` times as long.

    Args:
      options: further fields of the experiment, in place of these.
    """
    fields = {
        "name": "ablation",
        "model": MODEL,
        "data": data(),
        "stages": (stage("train", scale),),
        "loop": LoopConfig(log_every=10, routing_every=10, checkpoint_every=100_000, keep_checkpoints=1),
        "evaluation": EvaluationConfig(task=HeldOutLoss(), batch_size=64),
    }
    return Experiment(**{**fields, **options})


def adapting(scale: str, lora: LoraConfig) -> Experiment:
    """A model that knows scenes in English learns new colours, new shapes and Chinese, by adapters.

    The vectors of tokens train beside them, as those of Chinese are new.
    """
    new = {"languages": ("zh",), "num_colours": 8, "num_shapes": 6}
    sources = scenes("known", 1, languages=("en",)), scenes("new", 3, **new)
    ends = ("language/embedding.*", "language/head.*")
    return experiment(
        scale,
        data=data(sources=sources, evaluation=(scenes("heldout", 2, 256, **new),)),
        stages=(
            stage("pretrain", scale, steps=90, sources=("known",)),
            stage("adapt", scale, steps=90, sources=("new",), trainable=ends, lora=lora),
        ),
    )
