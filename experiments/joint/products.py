"""Product search: by words, in two languages, or by another picture.

    python -m vl_jax train --config=joint/products:clothing --workdir=runs/clothing_search
    python -m vl_jax train --config=joint/products:furniture --workdir=runs/furniture_search

``clothing``: photographs of clothes and what they show, in English and in Chinese; what is found is right if
it is of the same class. ``furniture`` (``ikea_products``, research use only): a product by "colour type,
description". Many products share all three, so a hit is counted by product and by type and colour.
"""

import dataclasses
import json
from pathlib import Path

from vl_jax import config
from vl_jax.data.config import DataConfig
from vl_jax.data.images.augment import AugmentationConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sample import DEFAULT_MAX_PIXELS, TEXT, Sample, Turn, image_in
from vl_jax.encoders.resnet import ResNetConfig
from vl_jax.encoders.text import TextEncoderConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.evaluate.tasks.retrieval import Retrieval
from vl_jax.experiment import Experiment
from vl_jax.heads.pairs import Pairs
from vl_jax.joint import JointConfig, Tower
from vl_jax.train.loop import LoopConfig
from vl_jax.train.objectives.contrastive import ContrastivePairs
from vl_jax.train.optimizer import OptimizerConfig
from vl_jax.train.stages import Stage

SIDE, TOKENS = 64, 48
CHINESE = {
    "dress": "连衣裙",
    "hat": "帽子",
    "longsleeve": "长袖衫",
    "outwear": "外套",
    "pants": "裤子",
    "shirt": "衬衫",
    "shoes": "鞋子",
    "shorts": "短裤",
    "skirt": "裙子",
    "t-shirt": "T恤",
}


def names_of_clothes(record):
    """What a photograph shows, in both languages, and its class."""
    label = record["label"]
    return (("en", f"a photo of {label}"), ("zh", f"一张{CHINESE[label]}的照片")), label


def description(record):
    """Colour, type and description of a product, and what products that look alike share."""
    kind = " ".join(filter(None, (record["color"].replace(",", " "), record["type"])))
    return (("en", ", ".join(filter(None, (kind, record["desc"])))),), kind


@dataclasses.dataclass(frozen=True)
class ProductsConfig:
    """Products, each with its picture and a text in each language."""

    name: str
    file: str
    clothes: bool  # or furniture

    def open(self, root, *, orientation="shown"):
        """The samples."""
        return Products(self, Path(root).resolve(), orientation)


class Products:
    """One sample of a product and a language; labels are the product and its kind."""

    def __init__(self, source, root, orientation):
        self.files, self.orientation = [root / source.file], orientation
        texts_of = names_of_clothes if source.clothes else description
        records = json.loads(self.files[0].read_text(encoding="utf-8"))
        told = [(record, *texts_of(record)) for record in records]
        self.samples = [(record, *said, kind) for record, texts, kind in told for said in texts]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        record, language, text, kind = self.samples[index]
        where = f"sample {record['id']} ({self.files[0]})"
        folder = self.files[0].parent
        picture = image_in(folder, record["image"], where, DEFAULT_MAX_PIXELS, self.orientation)
        turn = Turn("<image>\n", text, kind=TEXT, language=language)
        return Sample(
            f"{record['id']} {language}", (turn,), (picture,), labels={"product": record["id"], "kind": kind}
        )


def get_config(choice: str = "clothing"):
    """The experiment of that name."""
    return config.view(config.choose(choice, clothing, furniture))


def clothing():
    """Ten classes of clothes; a photograph of the same class is as good as the photograph itself."""
    return _search("clothing", clothes=True, identity="kind")


def furniture():
    """Products by their description."""
    return _search("ikea_products", clothes=False, identity="product")


def _search(name, *, clothes, identity):
    image = ResNetConfig(
        stem_dim=16,
        stage_dims=(32, 64, 96),
        stage_blocks=(1, 1, 1),
        block="basic",
        statistics="moving",
        image_size=SIDE,
    )
    text = TextEncoderConfig(
        vocab_size=2048,
        max_length=TOKENS,
        embed_dim=96,
        mlp_dim=192,
        num_layers=2,
        num_heads=4,
        activation="gelu_tanh",
        causal=False,
        projection_dim=0,
    )
    rate = OptimizerConfig(
        method="muon", learning_rate=2e-3, warmup_steps=20, final_fraction=0.03, weight_decay=0.1
    )
    return Experiment(
        name=f"{name}_search",
        model=JointConfig(
            (Tower("image", image), Tower("text", text, "tokens")), (Pairs(dim=96, identity=identity),)
        ),
        data=DataConfig(
            root="../shared/data",
            sources=(ProductsConfig("train", f"{name}/train.json", clothes),),
            evaluation=(ProductsConfig("val", f"{name}/val.json", clothes),),
            max_tokens=TOKENS,
            augmentation=AugmentationConfig(brightness=0.2, contrast=0.2, crop=0.3),
            tiling=TilingConfig(tile_size=SIDE, views="global"),
        ),
        stages=(Stage("pairs", steps=400, batch_size=64, objective=ContrastivePairs(), optimizer=rate),),
        loop=LoopConfig(log_every=10, checkpoint_every=1000),
        evaluation=EvaluationConfig(task=Retrieval(alike="kind", picture="product"), batch_size=64),
    )
