"""Speaking: says a digit that is written, in the voice of a named speaker or of any.

    python -m vl_jax train --config=experiments/speaking.py --workdir=runs/speaking
    python -m vl_jax predict --workdir=runs/speaking --head=speech --text="seven, jackson" --save=seven.wav

Both stages read the recordings of five speakers. The first trains a recogniser of digits, which hears sounds
as log-mel pictures, the second the text tower and the head that speaks; the two share no parameter. What is
spoken is judged as a sound: its samples become a picture as those of a recording do.
"""

import dataclasses
import functools
import json
from pathlib import Path

from vl_jax import config
from vl_jax.data.config import DataConfig, LoadingConfig
from vl_jax.data.files.sound_files import read_sound
from vl_jax.data.images.audio import AudioConfig, resample, sound_in
from vl_jax.data.images.augment import AugmentationConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sample import TEXT, Sample, Turn
from vl_jax.encoders.resnet import ResNetConfig
from vl_jax.encoders.text import TextEncoderConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.evaluate.tasks.creations import Creations
from vl_jax.experiment import Experiment
from vl_jax.heads.classification import Classification
from vl_jax.heads.speech.speaking import Speaking
from vl_jax.joint import JointConfig, Tower
from vl_jax.train.loop import LoopConfig
from vl_jax.train.objectives.heads import Heads
from vl_jax.train.optimizer import OptimizerConfig
from vl_jax.train.stages import Stage

SIZE = 64
SPOKEN = AudioConfig(sample_rate=8000, window_ms=32, hop_ms=12, num_bands=64, floor_db=-100, max_seconds=1.15)
AUDIO = dataclasses.replace(SPOKEN, min_seconds=0.768)  # as the recogniser hears it
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo")


@dataclasses.dataclass(frozen=True)
class DigitsConfig:
    """Recordings of spoken digits, each with the word as its text, and with the word and its speaker."""

    name: str
    file: str
    once: bool = False  # one sample of every text
    folder: str = ""  # of the data, in the root

    def open(self, root, *, orientation="shown"):
        """The samples."""
        return Digits(self, (Path(root) / self.folder).resolve())


class Digits:
    """Two samples a recording: with its speaker in the text, and without."""

    def __init__(self, source, root):
        self.root, self.files = root, [root / source.file]
        records = json.loads(self.files[0].read_text(encoding="utf-8"))
        longest = SPOKEN.max_seconds * SPOKEN.sample_rate
        records = [r for r in records if r["speaker"] in SPEAKERS and r["samples"] <= longest]
        self.samples = [(text, r) for r in records for text in texts_of(r)]
        if source.once:
            self.samples = list({text: (text, r) for text, r in self.samples}.values())

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        text, record = self.samples[index]
        where = f"sample {record['id']} ({self.files[0]})"
        picture = sound_in(self.root, record["audio"], where, AUDIO)
        return Sample(
            f"{record['id']} {text}",
            (Turn("<image>\n", text, kind=TEXT),),
            (picture,),
            labels={"label": WORDS[record["label"]]},
            media={"sound": functools.partial(samples_of, picture.path, where)},
        )


def texts_of(record):
    """What may be asked for to hear a recording like this."""
    word = WORDS[record["label"]]
    return word, f"{word}, {record['speaker']}"


def samples_of(path, where):
    """The samples of a recording at the rate of the spectrogram."""
    samples, rate = read_sound(path, where)
    return resample(samples.mean(1), rate, SPOKEN.sample_rate)


def get_config():
    """The experiment."""
    text = TextEncoderConfig(
        vocab_size=2048,
        max_length=16,
        embed_dim=64,
        mlp_dim=128,
        num_layers=1,
        num_heads=4,
        activation="gelu_tanh",
        causal=False,
        projection_dim=0,
    )
    image = ResNetConfig(
        stem_dim=16, stage_dims=(32, 64, 96), stage_blocks=(1, 1, 1), block="basic", image_size=SIZE
    )
    rate = OptimizerConfig(method="muon", learning_rate=2e-3, warmup_steps=20, final_fraction=0.01)
    experiment = Experiment(
        name="speaking",
        model=JointConfig(
            (Tower("text", text, "tokens"), Tower("image", image)),
            (Speaking(audio=SPOKEN, heard=AUDIO, reduction=4, dim=192, num_layers=4), Classification(WORDS)),
        ),
        data=DataConfig(
            root="../shared/data/fsdd_digits",
            sources=(DigitsConfig("train", "train.json"),),
            evaluation=(DigitsConfig("val", "val.json", once=True),),
            max_tokens=16,
            augmentation=AugmentationConfig(brightness=0.3, contrast=0.2, crop=0.25),
            tiling=TilingConfig(tile_size=SIZE, views="global", padding_colour=(0, 0, 0)),
            loading=LoadingConfig(cache_mb=64),
        ),
        stages=(
            Stage(
                "hear",
                steps=300,
                batch_size=32,
                trainable=("image/.*", "label/.*"),
                objective=Heads(),
                optimizer=rate,
            ),
            Stage(
                "speak",
                steps=900,
                batch_size=32,
                trainable=("text/.*", "speech/.*"),
                objective=Heads(("speech",)),
                optimizer=rate,
            ),
        ),
        loop=LoopConfig(log_every=20, checkpoint_every=500),
        evaluation=EvaluationConfig(task=Creations("speech", copy=None), batch_size=32),
    )
    return config.view(experiment)
