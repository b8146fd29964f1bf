"""Contrastive training: pictures and texts in English and Chinese, found by one another.

    python -m vl_jax train --config=experiments/contrastive.py:twemoji --workdir=runs/twemoji

Choices: ``twemoji`` (drawings and their names), ``flickr8k`` (photographs and captions), and ``published``:
the data of flickr8k for a published CLIP, the folder that ``--config.init`` names, which is trained further.
``--config.stages.pairs.objective.loss=sigmoid --config.model.heads.pairs.bias=true`` trains as SigLIP does.
A published SigLIP needs that loss, and ``--config.data.max_tokens=64``.
"""

import dataclasses

from vl_jax import config
from vl_jax.data.config import DataConfig
from vl_jax.data.images.augment import AugmentationConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sources.llava import LlavaConfig
from vl_jax.encoders.text import TextEncoderConfig
from vl_jax.encoders.vit import ViTConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.evaluate.tasks.retrieval import Retrieval
from vl_jax.experiment import Experiment
from vl_jax.heads.pairs import Pairs
from vl_jax.joint import JointConfig, Tower
from vl_jax.train.loop import LoopConfig
from vl_jax.train.objectives.contrastive import ContrastivePairs
from vl_jax.train.optimizer import OptimizerConfig
from vl_jax.train.stages import Stage

IMAGE = ViTConfig(
    image_size=48, patch_size=8, stem="conv", embed_dim=128, mlp_dim=384, num_layers=3, num_heads=4
)
TEXT = TextEncoderConfig(
    vocab_size=2048,
    max_length=96,
    embed_dim=128,
    mlp_dim=384,
    num_layers=2,
    num_heads=4,
    activation="gelu_tanh",
    causal=False,
    projection_dim=0,
)
RATE = OptimizerConfig(method="muon", learning_rate=1e-3, warmup_steps=30, final_fraction=0.03)


def get_config(name: str = "twemoji"):
    """The experiment of that name."""
    return config.view(config.choose(name, twemoji, flickr8k, published))


def twemoji():
    """1,198 drawings and their short names in two languages; 135 drawings are held out."""
    return _pairs("twemoji_bilingual", IMAGE, TEXT, max_tokens=48, steps=300)


def flickr8k():
    """623 photographs with ten captions each; 74 photographs are held out."""
    text = dataclasses.replace(TEXT, num_layers=1, max_length=64)
    found = _pairs("flickr8k_bilingual", IMAGE, text, max_tokens=48, steps=300)
    # So few photographs are learned by heart: they are changed more, and weights decay more.
    changes = AugmentationConfig(brightness=0.3, contrast=0.3, saturation=0.3, crop=0.5, flip_rate=0.5)
    (stage,) = found.stages
    return dataclasses.replace(
        found,
        data=dataclasses.replace(found.data, augmentation=changes),
        stages=(dataclasses.replace(stage, optimizer=dataclasses.replace(RATE, weight_decay=0.2)),),
    )


def published():
    """A checkpoint of CLIP, trained further with small steps; towers, tokenizer and tiling are its own."""
    found = _pairs("flickr8k_bilingual", IMAGE, TEXT, max_tokens=77, steps=300)
    (stage,) = found.stages
    rate = OptimizerConfig(learning_rate=1e-5, warmup_steps=30)
    return dataclasses.replace(
        found,
        name="published_pairs",
        init="clip-vit-base-patch32",
        data=dataclasses.replace(found.data, tiling=TilingConfig()),
        stages=(dataclasses.replace(stage, batch_size=64, optimizer=rate),),
    )


def _pairs(folder, image, text, *, max_tokens, steps):
    source = LlavaConfig("train", "train.json", labels=("image",), caption=True)
    return Experiment(
        name=folder,
        model=JointConfig(
            towers=(Tower("image", image), Tower("text", text, "tokens")),
            heads=(Pairs(dim=128, identity="image"),),
        ),
        data=DataConfig(
            root=f"../shared/data/{folder}",
            sources=(source,),
            evaluation=(dataclasses.replace(source, name="val", file="val.json"),),
            max_tokens=max_tokens,
            augmentation=AugmentationConfig(brightness=0.2, contrast=0.2, crop=0.3),
            tiling=TilingConfig(tile_size=image.image_size, views="global"),
        ),
        stages=(Stage("pairs", steps=steps, batch_size=128, objective=ContrastivePairs(), optimizer=RATE),),
        loop=LoopConfig(log_every=10, checkpoint_every=500),
        evaluation=EvaluationConfig(task=Retrieval(), batch_size=64),
    )
