"""Three decoders in one model: it draws and says what it reads, and writes what it sees, as a task asks.

    python -m vl_jax train --config=joint/decoders --workdir=runs/decoders
    python -m vl_jax predict --workdir=runs/decoders --task=draw --text=heart --save=heart.png
    python -m vl_jax predict --workdir=runs/decoders --task=say --text="seven, theo" --save=seven.wav
    python -m vl_jax predict --workdir=runs/decoders --task=write --image=heart.png

Emoji of five groups (``twemoji_bilingual``) and spoken digits (``fsdd_digits``), which are seen as
spectrograms; their sources are those of the experiments ``emoji`` and ``speaking``. The first stage trains
what sees: a judge of groups and digits, and the decoder that writes their words. The second trains the two
that make something, on batches of both sets, each over the rows that it can learn from. A task reads and
computes its own decoder and the tower beneath it, and no other.
"""

import dataclasses

from vl_jax import config
from vl_jax.data.config import DataConfig, LoadingConfig
from vl_jax.data.images.augment import AugmentationConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sources.build import InDomainConfig
from vl_jax.encoders.resnet import ResNetConfig
from vl_jax.evaluate.metrics.text.error_rate import ErrorRate
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.evaluate.tasks.creations import Creations
from vl_jax.evaluate.tasks.transcripts import Transcripts
from vl_jax.experiment import Experiment
from vl_jax.heads.classification import Classification
from vl_jax.heads.image.picture_flow import PictureFlow
from vl_jax.heads.image.unet import UNetConfig
from vl_jax.heads.text.writing import Writing
from vl_jax.joint import JointConfig, Tower
from vl_jax.train.loop import LoopConfig
from vl_jax.train.objectives.denoising import Denoising
from vl_jax.train.objectives.heads import Heads
from vl_jax.train.optimizer import OptimizerConfig
from vl_jax.train.stages import Stage

EMOJI, SPEAKING = config.load("emoji"), config.load("speaking")
SIZE = 64
GROUPS = ("flag", "clock", "heart", "face", "family")
DIGITS = SPEAKING.model.head("label").classes
WRITTEN = Transcripts("words", headline="cer", metrics=(ErrorRate("cer", "character"),))
# How each held-out source is judged.
JUDGED = {
    "drawn": Creations("picture"),
    "said": Creations("speech", copy=None),
    "written_emoji": WRITTEN,
    "written_digits": WRITTEN,
}


@dataclasses.dataclass(frozen=True)
class ByDecoder:
    """Every held-out source by the task of its decoder; the headline is the share that is right."""

    headline: str = "right"

    def run(self, examinee):
        """Goes through the source once."""
        counts = []
        findings = yield from _counted(JUDGED[examinee.source].run(examinee), counts)
        scores = {"right": sum(counts) / len(counts), **findings.scores}
        return dataclasses.replace(findings, scores=scores, shares=("right", *findings.shares))


def _counted(running, counts):
    """The records and the findings of a task, whether each record is right kept beside."""
    while True:
        try:
            record = next(running)
        except StopIteration as end:
            return end.value
        counts.append(record["correct"])
        yield record


def drawings(name, source):
    """A source of ``emoji`` as one of several."""
    source = dataclasses.replace(source, name=name, folder="twemoji_bilingual")
    return InDomainConfig(name, "drawings", source)


def digits(name, source):
    """A source of ``speaking`` as one of several."""
    return InDomainConfig(name, "sounds", dataclasses.replace(source, name=name, folder="fsdd_digits"))


def get_config():
    """The experiment."""
    groups = {source.name: source for source in EMOJI.data.sources}
    held_out = dataclasses.replace(EMOJI.data.evaluation[0], groups=GROUPS)
    spoken = SPEAKING.data.evaluation[0]
    rate = OptimizerConfig(method="muon", learning_rate=2e-3, warmup_steps=20, final_fraction=0.01)
    image = ResNetConfig(
        stem_dim=16, stage_dims=(32, 64, 96), stage_blocks=(1, 1, 1), block="basic", image_size=SIZE
    )
    text = next(tower for tower in SPEAKING.model.towers if tower.name == "text")
    picture = PictureFlow(size=SIZE, network=UNetConfig(patch=4), says="picture", domain="drawings")
    both = {"sources": (*GROUPS, "digits"), "weights": (*[1.0] * len(GROUPS), float(len(GROUPS)))}
    return config.view(
        Experiment(
            name="decoders",
            model=JointConfig(
                (text, Tower("image", image)),
                (
                    Writing(stream="image", field="label", max_length=12),
                    picture,
                    SPEAKING.model.head("speech"),
                    Classification((*GROUPS, *DIGITS)),
                ),
                tasks=(("write", "words"), ("draw", "picture"), ("say", "speech")),
            ),
            data=DataConfig(
                root="../shared/data",
                sources=(
                    *(drawings(name, groups[name]) for name in GROUPS),
                    digits("digits", SPEAKING.data.sources[0]),
                ),
                evaluation=(
                    drawings("drawn", held_out),
                    digits("said", spoken),
                    drawings("written_emoji", dataclasses.replace(held_out, count=0)),
                    digits("written_digits", dataclasses.replace(spoken, once=False)),
                ),
                max_tokens=16,
                augmentation=AugmentationConfig(crop=0.2),
                tiling=TilingConfig(tile_size=SIZE, views="global", padding_colour=(0, 0, 0)),
                loading=LoadingConfig(cache_mb=64),
            ),
            stages=(
                Stage(
                    "see",
                    steps=200,
                    batch_size=32,
                    trainable=("image/.*", "label/.*", "words/.*"),
                    objective=Heads(("label", "words")),
                    optimizer=rate,
                    **both,
                ),
                Stage(
                    "make",
                    steps=300,
                    batch_size=32,
                    trainable=("text/.*", "picture/.*", "speech/.*"),
                    objective=Denoising(("picture", "speech")),
                    optimizer=rate,
                    **both,
                ),
            ),
            loop=LoopConfig(log_every=20, checkpoint_every=500),
            evaluation=EvaluationConfig(task=ByDecoder(), batch_size=64),
        )
    )
