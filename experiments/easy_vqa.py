"""easy-VQA: real image files in LLaVA JSON, one coloured shape a picture.

    python -m vl_jax train --config=experiments/easy_vqa.py --config.data.root=../shared/data/easy_vqa --workdir=runs/easy_vqa

Any folder of that format works (``train.json``, ``val.json`` and the images they name).
"""

import dataclasses
import importlib.util
from pathlib import Path

from vl_jax import config
from vl_jax.data.encode import DataConfig
from vl_jax.data.images import TilingConfig
from vl_jax.data.llava import LlavaConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.experiment import Experiment
from vl_jax.train.loop import LoopConfig
from vl_jax.train.optimizer import OptimizerConfig
from vl_jax.train.stages import Stage


def get_config(arg: str = ""):
    spec = importlib.util.spec_from_file_location("q", Path(__file__).with_name("quickstart.py"))
    q = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(q)
    rate = OptimizerConfig(learning_rate=1e-3, warmup_steps=30, final_fraction=0.05)
    return config.view(
        Experiment(
            name="easy_vqa",
            model=q.MODEL,
            data=DataConfig(
                root="../shared/data/easy_vqa",
                sources=(LlavaConfig(name="train", file="train.json"),),
                evaluation=(LlavaConfig(name="val", file="val.json"),),
                max_tokens=128,
                max_turns=6,
                max_answer_tokens=24,
                turn_sampling="balanced",
                tiling=TilingConfig(tile_size=64, views="global"),
            ),
            stages=(Stage("sft", steps=1000, batch_size=16, targets="answers", optimizer=rate),),
            loop=LoopConfig(log_every=10, routing_every=50, checkpoint_every=250),
            evaluation=EvaluationConfig(limit=600, per_sample=4, max_new_tokens=8),
        )
    )
