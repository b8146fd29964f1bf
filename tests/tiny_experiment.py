"""An experiment of seconds: two stages of ten steps on procedural scenes, a checkpoint every four steps.

With ``:packed`` behind the file's name, a row holds several samples, and both stages train the same.
"""

from vl_jax import config
from vl_jax.data.config import ConversationConfig, DataConfig, PackingConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sources.scenes import ScenesConfig
from vl_jax.encoders.adapter import AdapterConfig
from vl_jax.encoders.vit import ViTConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.experiment import Experiment
from vl_jax.language.decoder import DecoderConfig
from vl_jax.language.mla import MLAConfig
from vl_jax.model import VisionLanguageConfig
from vl_jax.moe.config import BalanceConfig, SharedExpertsConfig
from vl_jax.moe.routing import MoEConfig
from vl_jax.train.loop import LoopConfig
from vl_jax.train.stages import Stage


def get_config(arg: str = ""):
    packed = arg == "packed"
    language = ("adapter/.*", "language/.*")
    return config.view(
        Experiment(
            name="tiny",
            model=VisionLanguageConfig(
                encoder=ViTConfig(
                    image_size=32, patch_size=8, embed_dim=16, mlp_dim=32, num_layers=1, num_heads=2
                ),
                adapter=AdapterConfig(num_layers=1),
                language=DecoderConfig(
                    vocab_size=2048,
                    embed_dim=16,
                    mlp_dim=32,
                    num_layers=2,
                    num_dense_layers=1,
                    attention=MLAConfig(
                        num_heads=2, kv_lora_rank=8, qk_nope_dim=4, qk_rope_dim=4, v_head_dim=4
                    ),
                ),
                moe=MoEConfig(
                    scheme="loss_free",
                    num_experts=4,
                    top_k=2,
                    expert_dim=8,
                    shared=SharedExpertsConfig(num=1),
                    balance=BalanceConfig(scope="batch" if packed else "sequence"),
                ),
            ),
            data=DataConfig(
                sources=(ScenesConfig("scenes", num_examples=1000),),
                evaluation=(ScenesConfig("heldout", num_examples=4, seed=1),),
                max_tokens=96,
                conversation=ConversationConfig(max_turns=2, turn_sampling="uniform"),
                image_dropout_rate=0.1,
                tiling=TilingConfig(tile_size=32, views="global"),
                packing=PackingConfig(max_tokens=192, max_tiles=5, window=100) if packed else None,
            ),
            stages=(
                Stage("first", steps=9, batch_size=8, targets="all", trainable=language),
                Stage("second", steps=7, batch_size=8, trainable=language if packed else (".*",)),
            ),
            loop=LoopConfig(log_every=1, routing_every=2, checkpoint_every=4, churn=True),
            evaluation=EvaluationConfig(batch_size=8, limit=8, max_new_tokens=4, prior_samples=10),
        )
    )
