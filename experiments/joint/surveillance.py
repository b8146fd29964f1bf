"""Surveillance: what is out of the ordinary on a walkway, from clips, sounds and subtitles.

    python -m vl_jax train --config=joint/surveillance --workdir=runs/surveillance
    python -m vl_jax train --config=joint/surveillance:clip,fold=2 --workdir=runs/clip_2
    python -m vl_jax sweep --config=joint/surveillance --sweep=surveillance --workdir=runs/surveillances

Clips of eight frames (``ucsd_ped2``): people walk, and sometimes somebody rides, skates or drives. Each fold
holds three of the twelve recordings out, all frames of them. The recordings are silent: a sound is made up
for every clip (steps, or wheels) and a line of subtitles written, each of which fits what is seen seven times
out of ten. ``clip`` is the clip alone. AUROC is of frames. Published figures train on recordings that are not
in this set, and cannot be compared.
"""

import dataclasses
import functools
import random

import numpy as np

from vl_jax import config
from vl_jax.ablation.plan import Ablation, Arm, Claim
from vl_jax.data.config import DataConfig
from vl_jax.data.images.audio import AudioConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sources.filters.written import Wording, Written
from vl_jax.data.sources.recorded.walks import RecordedWalksConfig
from vl_jax.encoders.series.recurrent import RecurrentConfig
from vl_jax.encoders.sound.spectrogram import SpectrogramConfig
from vl_jax.encoders.text import TextEncoderConfig
from vl_jax.encoders.video.resnet3d import VideoResNetConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.evaluate.tasks.labels import Labels
from vl_jax.experiment import Experiment
from vl_jax.fusion.build import Apart
from vl_jax.fusion.fusion_transformer import FusionTransformer
from vl_jax.fusion.layers import LayersConfig
from vl_jax.heads.classification import Classification
from vl_jax.joint import JointConfig, Tower
from vl_jax.train.loop import LoopConfig
from vl_jax.train.objectives.heads import Heads
from vl_jax.train.optimizer import OptimizerConfig
from vl_jax.train.stages import Stage

FRAMES, SIZE, TOKENS = 8, (64, 96), 16
MODALITIES = ("clip", "sound", "line")
RATE, SECONDS = 8000, 0.8  # samples a second of a sound, and how long it is
AGREEMENT = 0.7  # how often a sound, and a line, fit what is seen
AUROC, ALARMS = "held_out: auroc", "held_out: false_alarms_95"
# Only 01, 02, 04, 07 and 12 have more than a few normal frames, so every fold has at least one of them.
FOLDS = (("01", "03", "08"), ("02", "05", "09"), ("04", "06", "10"), ("07", "11", "12"))
LINES = (
    Wording("normal", ("people walk by", "two of them talk", "a few students pass", "nothing to report")),
    Wording(
        "abnormal", ("somebody rides here", "a cart on the path", "watch out, wheels", "that one is fast")
    ),
)
AUDIO = AudioConfig(sample_rate=RATE, window_ms=32, hop_ms=16, num_bands=32, max_seconds=SECONDS)


@dataclasses.dataclass(frozen=True)
class HeardConfig:
    """Clips with a sound and a line that are made up for them."""

    name: str
    walks: RecordedWalksConfig
    given: tuple[str, ...] = MODALITIES
    agreement: float = AGREEMENT
    seed: int = 0

    def open(self, root, *, orientation="shown"):
        """The samples."""
        heard = Heard(self, self.walks.open(root, orientation=orientation))
        if "line" not in self.given:
            return heard
        options = {"agreement": self.agreement, "seed": self.seed}
        return Written(heard, label="event", wordings=LINES, **options)


class Heard:
    """The samples of a source of clips, a sound beside each that fits at a rate."""

    def __init__(self, source, walks):
        self.source, self.walks, self.files = source, walks, walks.files

    def __len__(self):
        return len(self.walks)

    def __getitem__(self, index):
        sample = self.walks[index]
        draw = random.Random(f"sound/{self.source.seed}/{sample.id}")
        event, fits = sample.labels["event"], draw.random() < self.source.agreement
        heard = event if fits else {"normal": "abnormal", "abnormal": "normal"}[event]
        sound = functools.partial(made_up, heard, draw.randrange(2**32))
        media = {**sample.media, "sound": sound}
        kept = {name: media[name] for name in self.source.given if name in media}
        return dataclasses.replace(sample, media=kept)


def made_up(event, seed):
    """The samples of a sound: dull steps, or the hum of wheels, in noise."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(RATE * SECONDS)) / RATE
    if event == "normal":
        pace, start = rng.uniform(1.6, 2.2), rng.uniform(0, 1)
        since = ((time * pace + start) % 1) / pace  # seconds after the last step
        wave = np.exp(-since * 30) * np.sin(2 * np.pi * rng.uniform(60, 120) * since)
    else:
        pitch = rng.uniform(250, 500)
        wave = sum(np.sin(2 * np.pi * pitch * n * time + rng.uniform(0, 6)) / n for n in (1, 2, 3))
    wave = wave * rng.uniform(0.2, 0.5) + rng.normal(size=len(time)) * 0.1
    return wave.astype(np.float32).clip(-1, 1)


def ablation_surveillance():
    """Each modality alone, clip and line, and all three."""

    def given(name, *modalities):
        parts = ("sources.train", "evaluation.held_out")
        return Arm(name, {f"data.{part}.given": repr(modalities) for part in parts})

    return Ablation(
        arms=(
            given("clip", "clip"),
            given("sound", "sound"),
            given("line", "line"),
            given("clip_and_line", "clip", "line"),
            given("all", *MODALITIES),
        ),
        metric=AUROC,
        better="higher",
        claims=(
            Claim(
                *("clip_and_line", "clip", ALARMS, "lower"),
                says="text beside video cuts false alarms by 60 % (an article on multimodal systems, without "
                "evidence)",
            ),
            Claim(*("all", "clip", AUROC, "higher"), says="all three are better than the clip (the same)"),
            Claim(*("all", "sound", AUROC, "higher"), says="and than the sound"),
            Claim(*("all", "line", AUROC, "higher"), says="and than the line"),
        ),
        equal=("steps", "samples"),
        columns=(ALARMS, "held_out: balanced_accuracy"),
        says="Does a camera raise fewer false alarms if it hears and reads as well?",
    )


def get_config(choice: str = "watched"):
    """The experiment of that name, with its options behind a comma."""
    return config.view(config.choose(choice, watched, clip))


def watched(fold: int = 0):
    """Clip, sound and line."""
    sound = SpectrogramConfig(
        AUDIO, coefficients=13, recurrent=RecurrentConfig(hidden_dim=32, bidirectional=True)
    )
    text = TextEncoderConfig(
        vocab_size=2048,
        max_length=TOKENS,
        embed_dim=48,
        mlp_dim=96,
        num_layers=1,
        num_heads=4,
        activation="gelu_tanh",
        causal=False,
        projection_dim=0,
    )
    towers = (_tower(), Tower("sound", sound, "sound"), Tower("text", text, "tokens"))
    fusion = FusionTransformer(LayersConfig(dim=64, mlp_dim=128, num_layers=1))
    return _experiment("surveillance", towers, "fused", fusion, MODALITIES, fold)


def clip(fold: int = 0):
    """The clip alone."""
    return _experiment("clip", (_tower(),), "clip", Apart(), ("clip",), fold)


def _tower():
    network = VideoResNetConfig(
        image_size=SIZE,
        num_frames=FRAMES,
        num_channels=1,
        stem_dim=16,
        stage_dims=(16, 32, 64),
        stage_blocks=(1, 1, 1),
        statistics="moving",
        pixel_mean=0.4,
        pixel_std=0.2,
    )
    return Tower("clip", network, "clip")


def _experiment(name, towers, stream, fusion, given, fold):
    if fold not in range(len(FOLDS)):
        raise ValueError(f"fold={fold}: expected 0 to {len(FOLDS) - 1}")
    held_out, others = FOLDS[fold], sum((names for i, names in enumerate(FOLDS) if i != fold), ())
    rate = OptimizerConfig(method="muon", learning_rate=1e-3, warmup_steps=20, final_fraction=0.03)
    return Experiment(
        name=name,
        model=JointConfig(
            towers, (Classification(("normal", "abnormal"), field="event", stream=stream),), fusion
        ),
        data=DataConfig(
            root="../shared/data/ucsd_ped2",
            sources=(_heard("train", others, given, hop=2),),
            evaluation=(_heard("held_out", held_out, given, hop=1),),
            max_tokens=TOKENS,
            tiling=TilingConfig(tile_size=8),  # rows have a tile, even if nothing is on it
        ),
        stages=(Stage("learn", steps=200, batch_size=16, objective=Heads(), optimizer=rate),),
        loop=LoopConfig(log_every=20, checkpoint_every=1000),
        evaluation=EvaluationConfig(
            task=Labels(headline="auroc", positive="abnormal", groups=("recording",)), batch_size=32
        ),
    )


def _heard(name, recordings, given, *, hop):
    walks = RecordedWalksConfig("walks", recordings=recordings, frames=FRAMES, hop=hop, size=SIZE)
    return HeardConfig(name, walks, given)
