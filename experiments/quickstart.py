"""Quickstart: a small, complete MoE vision-language model learns procedural scenes in minutes on two CPU cores.

    python -m vl_jax train --config=experiments/quickstart.py --workdir=runs/quickstart

Expected: held-out exact match >= 95 %, blind <= 50 %, under five minutes. The figures measured are in README.md
beside this file.
"""

from vl_jax import config
from vl_jax.adapter import AdapterConfig
from vl_jax.data.encode import DataConfig
from vl_jax.data.images import TilingConfig
from vl_jax.data.scenes import ScenesConfig
from vl_jax.encoders.vit import ViTConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.experiment import Experiment
from vl_jax.fusion.gate import CrossModalGateConfig
from vl_jax.language.decoder import DecoderConfig
from vl_jax.language.mla import MLAConfig
from vl_jax.model import FusionConfig, VisionLanguageConfig
from vl_jax.moe.routing import MoEConfig
from vl_jax.train.loop import LoopConfig
from vl_jax.train.optimizer import OptimizerConfig
from vl_jax.train.stages import Stage

MODEL = VisionLanguageConfig(
    encoder=ViTConfig(
        image_size=64, patch_size=8, embed_dim=96, mlp_dim=256, num_layers=1, num_heads=4, stem="conv"
    ),
    adapter=AdapterConfig(downsample=2, num_layers=2),
    fusion=FusionConfig(kind="prefix", gate=CrossModalGateConfig(num_heads=4, head_dim=24)),
    language=DecoderConfig(
        vocab_size=2048,
        embed_dim=96,
        mlp_dim=256,
        num_layers=3,
        num_dense_layers=1,
        attention=MLAConfig(num_heads=4, kv_lora_rank=48, qk_nope_dim=24, qk_rope_dim=16, v_head_dim=24),
    ),
    moe=MoEConfig(
        scheme="loss_free", num_experts=8, top_k=2, expert_dim=96, num_shared=1, normalize_gates=True
    ),
)

DATA = DataConfig(
    sources=(ScenesConfig(name="scenes", num_examples=1_000_000, seed=1),),
    evaluation=(ScenesConfig(name="scenes_heldout", num_examples=150, seed=2),),
    max_tokens=192,
    max_tiles=1,
    turns="independent",
    max_turns=9,
    turn_sampling="uniform",
    image_dropout_rate=0.02,
    tiling=TilingConfig(tile_size=64, views="global"),
)


def get_config(arg: str = ""):
    rate = OptimizerConfig(learning_rate=2e-3, warmup_steps=30, final_fraction=0.05)
    return config.view(
        Experiment(
            name="quickstart",
            model=MODEL,
            data=DATA,
            stages=(
                Stage(
                    "alignment",
                    steps=20,
                    batch_size=32,
                    targets="all",
                    trainable=("encoder/.*", "adapter/.*"),
                    optimizer=rate,
                ),
                Stage("pretraining", steps=60, batch_size=32, targets="all", optimizer=rate),
                Stage("sft", steps=500, batch_size=32, targets="answers", optimizer=rate),
            ),
            loop=LoopConfig(log_every=10, routing_every=50, checkpoint_every=250),
            evaluation=EvaluationConfig(limit=600, per_sample=4, max_new_tokens=8),
        )
    )
