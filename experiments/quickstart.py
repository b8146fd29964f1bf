"""Quickstart: a small, complete MoE vision-language model learns procedural scenes in minutes on a CPU.

    python -m vl_jax train --config=experiments/quickstart.py --workdir=runs/quickstart

The stages of DeepSeek-VL: alignment with the language model frozen; pretraining of everything on pairs of
objects, from which it learns *which* object a question means; then questions of every kind about scenes of
one or two objects, and more about how two objects lie to each other. The figures measured are in
experiments/README.md.
"""

import dataclasses

from vl_jax import config
from vl_jax.data.config import ConversationConfig, DataConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sources.scenes import ScenesConfig
from vl_jax.encoders.adapter import AdapterConfig
from vl_jax.encoders.vit import ViTConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.experiment import Experiment
from vl_jax.fusion.gate import CrossModalGateConfig
from vl_jax.language.decoder import DecoderConfig
from vl_jax.language.mla import MLAConfig
from vl_jax.model import FusionConfig, VisionLanguageConfig
from vl_jax.moe.config import GateConfig, SharedExpertsConfig
from vl_jax.moe.routing import MoEConfig
from vl_jax.nn.rope import RopeConfig
from vl_jax.train.loop import LoopConfig
from vl_jax.train.optimizer import OptimizerConfig
from vl_jax.train.stages import Stage

MODEL = VisionLanguageConfig(
    encoder=ViTConfig(
        image_size=64,
        patch_size=8,
        embed_dim=96,
        mlp_dim=256,
        num_layers=1,
        num_heads=4,
        stem="conv",
        pixel_mean=0.9,  # scenes are mostly light background
        pixel_std=0.3,
    ),
    adapter=AdapterConfig(downsample=2, num_layers=2),
    fusion=FusionConfig(kind="prefix", gate=CrossModalGateConfig(num_heads=4, head_dim=24)),
    language=DecoderConfig(
        vocab_size=2048,
        embed_dim=96,
        mlp_dim=256,
        num_layers=3,
        num_dense_layers=1,
        attention=MLAConfig(
            num_heads=4,
            kv_lora_rank=48,
            qk_nope_dim=24,
            qk_rope_dim=16,
            v_head_dim=24,
            # Rows are short: a small base lets most of the few frequencies tell positions apart.
            rope=RopeConfig(theta=100.0, pairs="adjacent"),
        ),
    ),
    moe=MoEConfig(
        scheme="loss_free",
        num_experts=8,
        top_k=2,
        expert_dim=96,
        shared=SharedExpertsConfig(num=1),
        gates=GateConfig(normalize=True),
    ),
)


def scenes(name: str, seed: int, num_examples: int = 1_000_000, **options) -> ScenesConfig:
    """One or two large objects of six colours and four shapes, and words of two languages."""
    size = {"max_objects": 2, "grid": 2, "num_colours": 6, "num_shapes": 4, "num_words": 6}
    return ScenesConfig(
        name=name, seed=seed, num_examples=num_examples, repeat_rate=0.3, **{**size, **options}
    )


def sweep_scheme():
    """Routing schemes on equal terms."""
    for scheme in ("loss_free", "top_k", "expert_choice"):
        yield {"model.moe.scheme": scheme}


def sweep_experts():
    """Fewer and larger experts, or more and smaller ones, at the same number of active parameters."""
    for num_experts, top_k, width in ((4, 1, 192), (8, 2, 96), (16, 4, 48)):
        yield {
            "model.moe.num_experts": num_experts,
            "model.moe.top_k": top_k,
            "model.moe.expert_dim": width,
            "model.moe.gates.normalize": top_k > 1,  # of one gate, the sum is the gate
        }


def get_config():
    """The experiment; every field can be set on the command line."""
    muon = OptimizerConfig(method="muon", learning_rate=1e-3, warmup_steps=30, schedule="constant")
    return config.view(
        Experiment(
            name="quickstart",
            model=MODEL,
            data=DataConfig(
                sources=(
                    scenes("pairs", 1, min_objects=2, kinds=("shape", "colour", "position")),
                    scenes("scenes", 2),
                    # A kind named twice is asked twice as often.
                    scenes("relations", 4, min_objects=2, kinds=("position", "relation", "relation")),
                ),
                evaluation=(scenes("heldout", 3, num_examples=150),),
                max_tokens=104,
                max_answer_tokens=18,
                conversation=ConversationConfig(max_turns=6, turn_sampling="uniform"),
                image_dropout_rate=0.02,
                tiling=TilingConfig(tile_size=64, views="global"),
            ),
            stages=(
                Stage(
                    "alignment",
                    steps=20,
                    batch_size=16,
                    sources=("pairs",),
                    targets="all",
                    trainable=("encoder/.*", "adapter/.*"),
                    optimizer=muon,
                ),
                Stage("pretraining", steps=620, batch_size=16, sources=("pairs",), optimizer=muon),
                Stage(
                    "sft",
                    steps=780,
                    batch_size=16,
                    sources=("scenes", "relations"),
                    weights=(0.7, 0.3),
                    optimizer=dataclasses.replace(muon, schedule="cosine", final_fraction=0.03),
                ),
            ),
            loop=LoopConfig(log_every=10, routing_every=50, checkpoint_every=400),
            evaluation=EvaluationConfig(limit=600, per_sample=4, max_new_tokens=8),
        )
    )
