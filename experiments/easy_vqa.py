"""easy-VQA: real image files in LLaVA JSON, one coloured shape a picture, the model of the quickstart.

    python -m vl_jax train --config=experiments/easy_vqa.py \
        --config.data.root=../shared/data/easy_vqa --workdir=runs/easy_vqa

Any folder of that format works: ``train.json``, ``val.json`` and the images they name.
"""

from vl_jax import config
from vl_jax.data.config import ConversationConfig, DataConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sources.llava import LlavaConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.experiment import Experiment
from vl_jax.train.loop import LoopConfig
from vl_jax.train.optimizer import OptimizerConfig
from vl_jax.train.stages import Stage

QUICKSTART = config.load("quickstart")


def get_config():
    """Half of the answers are forced to differ from yes and no, which drown the rest."""
    return config.view(
        Experiment(
            name="easy_vqa",
            model=QUICKSTART.model,
            data=DataConfig(
                root="../shared/data/easy_vqa",
                sources=(LlavaConfig(name="train", file="train.json"),),
                evaluation=(LlavaConfig(name="val", file="val.json"),),
                max_tokens=112,
                max_answer_tokens=24,
                conversation=ConversationConfig(max_turns=6, turn_sampling="balanced"),
                image_dropout_rate=0.02,
                tiling=TilingConfig(tile_size=64, views="global"),
            ),
            stages=(
                Stage(
                    "alignment",
                    steps=20,
                    batch_size=32,
                    targets="all",
                    trainable=("encoder/.*", "adapter/.*"),
                    optimizer=OptimizerConfig(learning_rate=1e-3, schedule="constant"),
                ),
                Stage(
                    "sft",
                    steps=1600,
                    batch_size=32,
                    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=30, final_fraction=0.03),
                ),
            ),
            loop=LoopConfig(log_every=10, routing_every=50, checkpoint_every=400),
            evaluation=EvaluationConfig(batch_size=128, max_new_tokens=6),
        )
    )
