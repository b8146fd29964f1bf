"""Specialisation: experts for a new domain, added to a frozen encoder; the other domains keep their bits.

    python -m vl_jax train --config=experiments/specialise.py --workdir=runs/specialise
    python -m vl_jax train --config=experiments/specialise.py:medical --workdir=runs/specialise_medical

The first run trains a small hybrid encoder on two domains: surfaces of magnetic tiles (industrial) and
clothes. Rows of a domain take two of its four experts. The second run begins with the first (it looks for
``runs/specialise``; ``--config.init=DIR`` names another), grows four experts as copies with noise, and trains
these alone, with a head, on chest radiographs. It shows

* that the trunk, the old experts and the old heads are the same to the bit, so what is said of tiles and
  clothes is too: compare ``eval/industrial/*.json`` and ``eval/clothing/*.json`` of both runs;
* what new experts add: ``--config.stages.specialise.trainable="('lungs/.*',)"
  --config.stages.specialise.experts="()"`` trains the head alone;
* which experts which domain goes to: the table at the end of "By group" in ``report.html``.

A router that learns domains, so that nobody has to say one when the model is used:
``--config.model.domains.picked=False --config.model.domains.weight=0.1``. Then old rows may take new experts,
and what is said of them may change.
"""

import dataclasses
import functools
from pathlib import Path

import numpy as np
from PIL import Image

from vl_jax import config
from vl_jax.data.config import DataConfig
from vl_jax.data.images.augment import AugmentationConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sample import IMAGE_PLACEHOLDER, TEXT, Sample, Turn
from vl_jax.data.sources.build import InDomainConfig
from vl_jax.data.sources.records import RecordsConfig
from vl_jax.encoders.hybrid import HybridConfig
from vl_jax.encoders.resnet import ResNetConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.evaluate.tasks.labels import Labels
from vl_jax.experiment import Experiment
from vl_jax.heads.classification import Classification
from vl_jax.joint import JointConfig, Tower
from vl_jax.moe.config import GateConfig
from vl_jax.moe.routing import MoEConfig
from vl_jax.moe.specialise.domains import Domain, DomainsConfig
from vl_jax.moe.specialise.growing import GrowthConfig
from vl_jax.train.loop import LoopConfig
from vl_jax.train.objectives.heads import Heads
from vl_jax.train.optimizer import OptimizerConfig
from vl_jax.train.stages import Stage

SIDE = 64
DEFECTS = ("free", "blowhole", "break", "crack", "fray", "uneven")
CLOTHES = ("dress", "hat", "longsleeve", "outwear", "pants", "shirt", "shoes", "shorts", "skirt", "t-shirt")
LUNGS = ("normal", "pneumonia")
XRAYS = "pneumonia_xray28/pneumoniamnist_balanced.npz"
OLD = (
    Classification(DEFECTS, name="defect", domain="industrial"),
    Classification(CLOTHES, name="clothes", domain="clothing"),
)
NEW = Classification(LUNGS, name="lungs", domain="medical")
INDUSTRIAL, CLOTHING = Domain("industrial", (0, 1, 2, 3)), Domain("clothing", (4, 5, 6, 7))
MEDICAL = Domain("medical", (8, 9, 10, 11))
# A grid of 4 x 4 tokens of 16 x 16 pixels.
ENCODER = HybridConfig(
    trunk=ResNetConfig(
        stem_dim=16,
        stage_dims=(16, 32, 64),
        stage_blocks=(1, 1, 1),
        block="basic",
        statistics="moving",
        image_size=SIDE,
    ),
    embed_dim=96,
    mlp_dim=192,
    num_layers=3,
    num_heads=4,
    moe=MoEConfig(
        scheme="loss_free", num_experts=8, top_k=2, expert_dim=96, gates=GateConfig(normalize=True)
    ),
    sparse_layers=(2,),
)


@dataclasses.dataclass(frozen=True)
class Radiographs:
    """Grey chest radiographs of 28 x 28 pixels in an archive of arrays, with or without pneumonia."""

    name: str
    split: str  # "train" or "val"
    file: str = XRAYS

    def open(self, root, *, orientation="shown"):
        """The samples; they have no way up to be turned by."""
        return RadiographSource(Path(root) / self.file, self.split)


class RadiographSource:
    """Random access to the radiographs of a split."""

    def __init__(self, path, split):
        if not path.is_file():
            raise ValueError(f"no file {path}; set config.data.root to the folder of the sets")
        with np.load(path) as arrays:
            self._images, self._labels = arrays[f"{split}_images"], arrays[f"{split}_labels"][:, 0]
        self._split, self.files = split, [path]

    def __len__(self):
        return len(self._images)

    def __getitem__(self, index):
        turn = Turn(f"{IMAGE_PLACEHOLDER}\n", "", kind=TEXT)
        image = functools.partial(_picture, self._images[index])
        return Sample(
            f"{self._split}-{index}", (turn,), (image,), labels={"label": LUNGS[self._labels[index]]}
        )


def _picture(levels):
    return Image.fromarray(levels).convert("RGB")


def source(domain: str, name: str, split: str) -> InDomainConfig:
    """The samples of a domain."""
    folders = {"industrial": "magnetic_tile", "clothing": "clothing"}
    if domain == "medical":
        return InDomainConfig(name, domain, Radiographs(name, split))
    file = f"{folders[domain]}/{split}.json"
    return InDomainConfig(name, domain, RecordsConfig(name, file, image="image", labels=("label",)))


def data(*domains: str) -> DataConfig:
    """Training and held-out samples of some domains."""
    return DataConfig(
        root="../shared/data",
        sources=tuple(source(domain, f"{domain}_train", "train") for domain in domains),
        evaluation=tuple(source(domain, domain, "val") for domain in domains),
        max_tokens=8,
        augmentation=AugmentationConfig(brightness=0.2, contrast=0.2, crop=0.3),
        tiling=TilingConfig(tile_size=SIDE, views="global"),
    )


def get_config(choice: str = "first"):
    """The first run, or the one that begins with it and adds a domain."""
    return config.view(config.choose(choice, first, medical))


def first() -> Experiment:
    """Two domains, trained from nothing."""
    rate = OptimizerConfig(method="muon", learning_rate=1e-3, warmup_steps=30, final_fraction=0.03)
    objective = Heads(tuple(head.name for head in OLD))
    domains = DomainsConfig((INDUSTRIAL, CLOTHING), others=INDUSTRIAL.experts)
    return Experiment(
        name="specialise",
        model=JointConfig((Tower("image", ENCODER),), OLD, domains=domains),
        data=data("industrial", "clothing"),
        stages=(Stage("train", steps=400, batch_size=32, objective=objective, optimizer=rate),),
        loop=LoopConfig(log_every=10, routing_every=50, checkpoint_every=500),
        evaluation=EvaluationConfig(task=Labels(head="", groups=("domain",)), batch_size=64),
    )


def medical() -> Experiment:
    """A third domain: new experts and a head; all else is frozen."""
    before = first()
    encoder = dataclasses.replace(ENCODER, moe=dataclasses.replace(ENCODER.moe, num_experts=12))
    domains = dataclasses.replace(before.model.domains, domains=(INDUSTRIAL, CLOTHING, MEDICAL))
    stage = Stage(
        "specialise",
        steps=150,
        batch_size=32,
        sources=("medical_train",),
        trainable=(r"image/vit/moe_blocks/moe/(w_in|w_out|router)", "lungs/.*"),
        experts=MEDICAL.experts,
        objective=Heads((NEW.name,)),
        optimizer=OptimizerConfig(method="muon", learning_rate=1e-3, warmup_steps=15, final_fraction=0.03),
    )
    return dataclasses.replace(
        before,
        name="specialise_medical",
        model=JointConfig((Tower("image", encoder),), (*OLD, NEW), domains=domains),
        data=data("industrial", "clothing", "medical"),
        stages=(stage,),
        init="runs/specialise",
        init_experts=GrowthConfig(copies=INDUSTRIAL.experts, noise=0.1),
    )
