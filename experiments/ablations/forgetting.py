"""Forgetting: what a model knows of one domain after it has learned another, by what of it was trained.

    python -m vl_jax sweep --config=ablations/forgetting --sweep=forgetting --workdir=runs/forgetting \\
        --config.data.root=../shared/data

A small hybrid encoder learns kinds of defect on magnetic tiles (industrial), then kinds of clothes. Four of
its eight experts are for each domain, and rows take those of theirs alone. In the second stage a head trains
in every arm; what trains beside it is what is compared. ``ablations/forgetting:4`` is four times as long.
"""

import dataclasses

from vl_jax import config
from vl_jax.ablation import miniature
from vl_jax.ablation.plan import Ablation, Arm, Claim
from vl_jax.data.config import DataConfig
from vl_jax.data.images.augment import AugmentationConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sources.build import InDomainConfig
from vl_jax.data.sources.records import RecordsConfig
from vl_jax.encoders.hybrid import HybridConfig
from vl_jax.encoders.resnet import ResNetConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.evaluate.tasks.labels import Labels
from vl_jax.heads.classification import Classification
from vl_jax.joint import JointConfig, Tower
from vl_jax.moe.specialise.domains import Domain, DomainsConfig
from vl_jax.train.objectives.heads import Heads

SIDE = 64
OLD, NEW = "industrial: balanced_accuracy", "clothing: balanced_accuracy"
DEFECTS = ("free", "blowhole", "break", "crack", "fray", "uneven")
CLOTHES = ("dress", "hat", "longsleeve", "outwear", "pants", "shirt", "shoes", "shorts", "skirt", "t-shirt")
_STAGE = "stages.adapt"
_EVERYTHING = {f"{_STAGE}.trainable": "('image/.*', 'clothes/.*')"}
_EXPERTS = r"('image/vit/moe_blocks/moe/(w_in|w_out|router)', 'clothes/.*')"
_ENCODER = HybridConfig(
    trunk=ResNetConfig(
        stem_dim=8,
        stage_dims=(8, 16, 32),
        stage_blocks=(1, 1, 1),
        block="basic",
        statistics="moving",
        image_size=SIDE,
    ),
    embed_dim=48,
    mlp_dim=96,
    num_layers=2,
    num_heads=2,
    moe=dataclasses.replace(miniature.EXPERTS, scheme="loss_free"),
    sparse_layers=(1,),
)


def ablation_forgetting():
    """With the head train: nothing, experts of the new domain, adapters, all, all on both domains."""
    adapters = {"rank": 8, "alpha": 16.0, "targets": "('image/vit/.*',)"}
    lora = {f"{_STAGE}.lora": "LoraConfig"} | {f"{_STAGE}.lora.{k}": v for k, v in adapters.items()}
    both = {f"{_STAGE}.sources": "()", f"{_STAGE}.objective.heads": "('defect', 'clothes')"}
    together = {**_EVERYTHING, **both, f"{_STAGE}.trainable": "('.*',)"}
    return Ablation(
        arms=(
            Arm("head"),
            Arm("experts", {f"{_STAGE}.trainable": _EXPERTS, f"{_STAGE}.experts": "(4, 5, 6, 7)"}),
            Arm("lora", lora),
            Arm("everything", _EVERYTHING),
            Arm("jointly", together),
        ),
        metric=OLD,
        better="higher",
        claims=(
            Claim(
                *("head", "everything", OLD, "higher"),
                says="a head is added without forgetting (an article on DeepSeek-VL, without evidence)",
            ),
            Claim(
                *("experts", "head", OLD, "not_lower"),
                margin=0.001,
                says="experts of a domain do not hurt the others (the same); here what is said of the old "
                "domain is the same to the bit",
            ),
            Claim(
                *("experts", "head", NEW, "higher"),
                says="experts of a domain give quality in it (the same)",
            ),
            Claim(
                *("lora", "everything", OLD, "higher"),
                says="adapters forget less (Biderman et al. 2024, arXiv 2405.09673, section 4)",
            ),
            Claim(
                *("jointly", "everything", OLD, "higher"),
                says="old samples among the new ones keep what was learned (rehearsal)",
            ),
            Claim(
                *("experts", "everything", NEW, "open"), says="what a frozen trunk costs in the new domain"
            ),
        ),
        equal=("steps", "samples", "tokens"),
        says="What does a model forget of one domain while it learns another?",
    )


def get_config(scale: str = "1"):
    """The experiment, ``scale`` times as long."""
    folders = {"industrial": "magnetic_tile", "clothing": "clothing"}

    def source(domain: str, name: str, split: str) -> InDomainConfig:
        file = f"{folders[domain]}/{split}.json"
        return InDomainConfig(name, domain, RecordsConfig(name, file, image="image", labels=("label",)))

    heads = (
        Classification(DEFECTS, name="defect", domain="industrial"),
        Classification(CLOTHES, name="clothes", domain="clothing"),
    )
    domains = DomainsConfig((Domain("industrial", (0, 1, 2, 3)), Domain("clothing", (4, 5, 6, 7))))
    learn = {"steps": 150, "batch_size": 32, "sources": ("industrial_train",)}
    adapt = {"steps": 150, "batch_size": 32, "sources": ("clothing_train",), "trainable": ("clothes/.*",)}
    return config.view(
        miniature.experiment(
            scale,
            model=JointConfig((Tower("image", _ENCODER),), heads, domains=domains),
            data=DataConfig(
                root="../shared/data",
                sources=tuple(source(name, f"{name}_train", "train") for name in folders),
                evaluation=tuple(source(name, name, "val") for name in folders),
                max_tokens=8,
                augmentation=AugmentationConfig(brightness=0.2, contrast=0.2, crop=0.3),
                tiling=TilingConfig(tile_size=SIDE, views="global"),
            ),
            stages=(
                miniature.stage("learn", scale, objective=Heads(("defect",)), **learn),
                miniature.stage("adapt", scale, objective=Heads(("clothes",)), **adapt),
            ),
            evaluation=EvaluationConfig(task=Labels(head="", headline="balanced_accuracy"), batch_size=64),
        )
    )
