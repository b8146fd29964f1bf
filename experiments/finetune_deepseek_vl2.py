"""Fine-tuning of a published DeepSeek-VL2 on your conversations about images, with adapters or in full.

    python -m vl_jax train --config=experiments/finetune_deepseek_vl2.py \
        --config.init=deepseek-vl2-tiny --config.data.root=my_data --workdir=runs/finetune

``init`` is the folder as downloaded: config, safetensors, tokenizer and processor, all of which are used.
``my_data`` holds ``train.json``, ``val.json`` (LLaVA JSON: see ``docs/data.md``) and their images.

What trains:

    adapters on attention (default)
    adapters elsewhere          --config.stages.sft.lora.targets="('attention', 'shared', 'routed', 'dense')"
                                also 'vision', 'projector', and any pattern of parameter paths
    of another size             --config.stages.sft.lora.rank=64 --config.stages.sft.lora.alpha=128
    and the projector in full   --config.stages.sft.trainable="('adapter/.*',)"
    everything                  --config=experiments/finetune_deepseek_vl2.py:full
    all but the vision tower    the same, with --config.stages.sft.trainable="('adapter/.*', 'language/.*')"

The routing bias of checkpoints that have one keeps balancing the experts in all of these; its step is
``--config.model.moe.balance.bias_rate`` (0: as published). Memory: ``--config.data.max_tiles`` and
``--config.data.tiling.views=global`` make rows smaller, ``--config.stages.sft.accumulation`` cuts batches,
``--config.mesh.data=1 --config.mesh.fsdp=-1`` spreads weights over the devices.
"""

import dataclasses

from vl_jax import config
from vl_jax.data.config import ConversationConfig, DataConfig
from vl_jax.data.sources.llava import LlavaConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.experiment import Experiment
from vl_jax.language.decoder import DecoderConfig
from vl_jax.model import VisionLanguageConfig
from vl_jax.train.loop import LoopConfig
from vl_jax.train.lora import LoraConfig
from vl_jax.train.optimizer import OptimizerConfig
from vl_jax.train.stages import Stage

LORA = Stage(
    "sft",
    steps=1000,
    batch_size=16,
    trainable=(),
    lora=LoraConfig(rank=16, alpha=32.0, targets=("attention",)),
    optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=30, weight_decay=0.0),
)
FULL = dataclasses.replace(
    LORA,
    trainable=(".*",),
    lora=None,
    optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=30),
)
STAGES = {"lora": LORA, "full": FULL}


def get_config(what: str = "lora"):
    """Of the model, only what no checkpoint says is set here: the rest is read from the folder."""
    if what not in STAGES:
        raise ValueError(f"{what!r} is not one of {', '.join(STAGES)}")
    return config.view(
        Experiment(
            name="finetune_deepseek_vl2",
            init="deepseek-vl2-tiny",
            model=VisionLanguageConfig(language=DecoderConfig(remat="full"), dtype="bfloat16"),
            data=DataConfig(
                root=".",
                sources=(LlavaConfig(name="train", file="train.json"),),
                evaluation=(LlavaConfig(name="val", file="val.json"),),
                max_tokens=2560,  # a picture of nine tiles has up to 2,101
                max_tiles=10,
                conversation=ConversationConfig(turns="dialogue"),
            ),
            stages=(STAGES[what],),
            loop=LoopConfig(log_every=10, routing_every=50, checkpoint_every=200),
            evaluation=EvaluationConfig(batch_size=8, limit=256, max_new_tokens=64),
        )
    )
