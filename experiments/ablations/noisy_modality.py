"""A modality made noise: does its weight fall, and the more so the more noise there is?

    python -m vl_jax sweep --config=ablations/noisy_modality --sweep=noisy_modality --workdir=runs/noisy
    python -m vl_jax train --config=ablations/noisy_modality --workdir=runs/mixed

A scene has one thing, and its shape is asked. The sentence beside it says a shape, the wrong one in four of
ten cases. Of every picture a share of the pixels is replaced by random ones. An arm has one share for all
pictures; what counts is the softmax weight of the picture. Without an arm the shares are mixed, and the
report has a table of the weights by share: there one model has to tell how noisy each picture is.
``ablations/noisy_modality:4`` is four times as long.
"""

import dataclasses
import itertools
import random

import numpy as np
from PIL import Image

from vl_jax import config
from vl_jax.ablation import miniature
from vl_jax.ablation.plan import Ablation, Arm, Claim
from vl_jax.data.sample import IMAGE_PLACEHOLDER, TEXT, Turn
from vl_jax.data.sources.scene_text import SHAPE_NAMES
from vl_jax.data.sources.scenes import ScenesConfig, ScenesSource
from vl_jax.encoders.text import TextEncoderConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.evaluate.tasks.labels import Labels
from vl_jax.fusion.mixing import Mixing
from vl_jax.heads.classification import Classification
from vl_jax.joint import JointConfig, Tower
from vl_jax.train.objectives.heads import Heads

WEIGHT, RIGHT = "gate/weight/image", "heldout: accuracy"
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclasses.dataclass(frozen=True)
class NoisyScenes:
    """Scenes of one thing, with pixels replaced by random ones, and a sentence that may be wrong."""

    name: str
    scenes: ScenesConfig
    shares: tuple[float, ...] = SHARES  # of pixels replaced; each picture has one of them
    wrong: float = 0.4  # share of the sentences that say another shape

    def open(self, root, *, orientation="shown"):
        """The source; it reads no file."""
        return _Noisy(self)


class _Noisy:
    def __init__(self, source):
        self._source, self._scenes = source, ScenesSource(source.scenes)

    def __len__(self):
        return len(self._scenes)

    def __getitem__(self, index):
        sample = self._scenes[index]
        (image,) = sample.images
        (item,) = image.scene.objects
        draw = random.Random(f"noisy/{sample.id}")
        share, said = draw.choice(self._source.shares), item.shape
        if draw.random() < self._source.wrong:
            said = draw.choice([shape for shape in SHAPE_NAMES if shape != item.shape])
        return dataclasses.replace(
            sample,
            turns=(Turn(f"{IMAGE_PLACEHOLDER}\n", f"a {item.colour} {said}", TEXT, "en"),),
            labels={"shape": item.shape, "noise": f"{share:.0%}"},
            images=(_NoisyImage(image, share, draw.getrandbits(32)),),
        )


@dataclasses.dataclass(frozen=True)
class _NoisyImage:
    """An image with a share of its pixels replaced."""

    image: object
    share: float
    seed: int

    def __call__(self):
        pixels, noise = np.asarray(self.image()), np.random.default_rng(self.seed)
        replaced = noise.random((*pixels.shape[:2], 1)) < self.share
        return Image.fromarray(
            np.where(replaced, noise.integers(0, 256, pixels.shape), pixels).astype(np.uint8)
        )

    def size(self):
        return self.image.size()


def ablation_noisy_modality():
    """No pixel replaced, a quarter, a half, three quarters, all."""
    fields = ("data.sources.train.shares", "data.evaluation.heldout.shares")
    arms = tuple(
        Arm(f"noise_{share:.0%}".removesuffix("%"), {field: f"({share},)" for field in fields})
        for share in SHARES
    )
    return Ablation(
        arms=arms,
        metric=WEIGHT,
        better="lower",
        claims=tuple(
            Claim(
                *(more.name, less.name, WEIGHT, "lower"),
                says="the weight of a modality falls when it is noisy (an article on multimodal systems, "
                "without evidence)",
            )
            for less, more in itertools.pairwise(arms)
        ),
        equal=("steps", "samples", "tokens", "parameters", "flops"),
        columns=(RIGHT, "gate/weight/*"),
        says="Does the weight of pictures fall with every share of pixels that is replaced?",
    )


def get_config(scale: str = "1"):
    """The experiment with all shares, ``scale`` times as long."""
    text = TextEncoderConfig(
        vocab_size=2048,
        max_length=16,
        embed_dim=48,
        mlp_dim=96,
        num_layers=1,
        num_heads=2,
        activation="gelu_tanh",
        causal=False,
        projection_dim=0,
    )
    shapes = Classification(SHAPE_NAMES, name="label", stream="fused", field="shape")
    one = {"max_objects": 1, "num_colours": 8, "num_shapes": 6, "languages": ("en",), "kinds": ("shape",)}
    return config.view(
        miniature.experiment(
            scale,
            model=JointConfig(
                towers=(Tower("image", miniature.ENCODER), Tower("text", text, "tokens")),
                fusion=Mixing(dim=48, dropout=0.2),
                heads=(shapes,),
            ),
            data=miniature.data(
                sources=(NoisyScenes("train", miniature.scenes("scenes", 1, **one)),),
                evaluation=(NoisyScenes("heldout", miniature.scenes("scenes", 2, 512, **one)),),
                max_tokens=16,
            ),
            stages=(miniature.stage("train", scale, steps=800, batch_size=32, objective=Heads(("label",))),),
            evaluation=EvaluationConfig(task=Labels(groups=("noise",)), batch_size=64),
        )
    )
