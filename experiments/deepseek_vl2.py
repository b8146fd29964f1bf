"""DeepSeek-VL2 at its published sizes, trained in its three stages: alignment, pretraining, fine-tuning.

    python -m vl_jax fit --config=experiments/deepseek_vl2.py:tiny --topology=v5e:2x4
"""

import dataclasses

from vl_jax import config
from vl_jax.data.config import ConversationConfig, DataConfig, PackingConfig
from vl_jax.data.sources.llava import LlavaConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.experiment import Experiment
from vl_jax.language.decoder import DecoderConfig
from vl_jax.language.gqa import GQAConfig
from vl_jax.model import VisionLanguageConfig
from vl_jax.moe.config import BalanceConfig, GateConfig
from vl_jax.moe.routing import MoEConfig
from vl_jax.sharding import MeshConfig
from vl_jax.train.loop import LoopConfig
from vl_jax.train.optimizer import OptimizerConfig
from vl_jax.train.stages import Stage

BASE = VisionLanguageConfig(language=DecoderConfig(remat="full"), dtype="bfloat16")
TINY = dataclasses.replace(
    BASE,
    language=dataclasses.replace(
        BASE.language, embed_dim=1280, mlp_dim=6848, num_layers=12, attention=GQAConfig(num_heads=10, num_kv_heads=10)
    ),
    moe=MoEConfig(scheme="top_k", num_experts=64, expert_dim=896, balance=BalanceConfig(weight=1e-3)),
)
SIZES = {"tiny": TINY, "base": BASE}


def get_config(size: str = "tiny"):
    return config.view(
        Experiment(
            name=f"deepseek_vl2_{size}",
            model=SIZES[size],
            data=DataConfig(
                root=".",
                sources=(LlavaConfig(name="train", file="train.json"),),
                evaluation=(LlavaConfig(name="val", file="val.json"),),
                max_tokens=2560,
                max_tiles=10,
                conversation=ConversationConfig(turns="dialogue"),
            ),
            stages=(Stage("sft", steps=1000, batch_size=8, optimizer=OptimizerConfig(learning_rate=3e-5, warmup_steps=30)),),
            loop=LoopConfig(log_every=10, routing_every=50, checkpoint_every=200),
            evaluation=EvaluationConfig(batch_size=8, limit=256, max_new_tokens=64),
            mesh=MeshConfig(data=1, fsdp=-1),
        )
    )
