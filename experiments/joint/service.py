"""Customer service: what a caller wants, and in what mood, from voice and words.

    python -m vl_jax train --config=joint/service --workdir=runs/service
    python -m vl_jax sweep --config=joint/service --sweep=emotion --workdir=runs/emotions
    python -m vl_jax sweep --config=joint/service --sweep=agreement --workdir=runs/agreements

Moods: acted Polish speech (``nemo_emotion``), of which every sentence is said in every mood, beside a line of
English dialogue (``meld_text``). They were not recorded together: a line has the mood of the voice seven
times out of ten. Wants: questions to a bank (``banking77``), written only. One model learns both; voices and
lines that it is judged by are of speakers and episodes that training lacks.
"""

import csv
from pathlib import Path

from vl_jax import config
from vl_jax.ablation.plan import Ablation, Arm, Claim
from vl_jax.data.config import DataConfig
from vl_jax.data.images.audio import AudioConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.media.wave import WaveConfig
from vl_jax.data.sources.build import MatchedConfig
from vl_jax.data.sources.filters.matched import SameKind
from vl_jax.data.sources.records import RecordsConfig
from vl_jax.encoders.series.recurrent import RecurrentConfig
from vl_jax.encoders.sound.spectrogram import SpectrogramConfig
from vl_jax.encoders.text import TextEncoderConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.evaluate.tasks.labels import Labels
from vl_jax.experiment import Experiment
from vl_jax.fusion.mixing import Mixing
from vl_jax.heads.classification import Classification
from vl_jax.joint import JointConfig, Tower
from vl_jax.train.loop import LoopConfig
from vl_jax.train.objectives.heads import Heads
from vl_jax.train.optimizer import OptimizerConfig
from vl_jax.train.stages import Stage

DATA = Path("../shared/data")
TOKENS = 64
AGREEMENT = 0.7  # how often a line has the mood of the voice
MOODS = {  # in the two sets
    "anger": "anger",
    "fear": "fear",
    "happiness": "joy",
    "neutral": "neutral",
    "sadness": "sadness",
    "surprised": "surprise",
}
MOOD = "calls: macro_f1"
_HEAD, _FUSION = "model.heads.mood.stream", "model.fusion"


def ablation_emotion():
    """Voice, words, both; and both by a transformer over all tokens."""
    small = {"dim": 64, "mlp_dim": 128, "num_layers": 1}
    layers = {f"{_FUSION}.layers.{name}": value for name, value in small.items()}
    return Ablation(
        arms=(
            Arm("voice", {_HEAD: "voice", _FUSION: "Apart"}),
            Arm("words", {_HEAD: "text", _FUSION: "Apart"}),
            Arm("both", {_HEAD: "fused"}),
            Arm("both_transformer", {_HEAD: "fused", _FUSION: "FusionTransformer", **layers}),
        ),
        metric=MOOD,
        better="higher",
        claims=(
            Claim(
                *("both", "voice", MOOD, "higher"),
                says="voice and words beat either for emotion (an article on multimodal systems)",
            ),
            Claim(*("both", "words", MOOD, "higher"), says="the same, beside words"),
            Claim(*("both_transformer", "both", MOOD, "open"), says="which way to read both is better"),
        ),
        equal=("steps", "samples"),
        columns=("calls: accuracy", "questions: accuracy"),
        says="Do voice and words together tell a mood better than either?",
    )


def ablation_agreement():
    """Words that tell nothing of the voice, that agree as often as not, and always."""

    def agreeing(rate: float) -> dict:
        return {f"data.{part}.calls.agreement": rate for part in ("sources", "evaluation")}

    return Ablation(
        arms=tuple(Arm(f"agree_{round(100 * rate)}", agreeing(rate)) for rate in (1 / 6, 0.5, 1.0)),
        metric=MOOD,
        better="higher",
        claims=(
            Claim(*("agree_100", "agree_17", MOOD, "higher"), says="words help if they agree (our own)"),
            Claim(*("agree_50", "agree_17", MOOD, "open"), says="from which agreement on"),
        ),
        equal=("steps", "samples"),
        says="How often do words have to agree with the voice?",
    )


def get_config():
    """The experiment."""
    voice = SpectrogramConfig(
        AudioConfig(num_bands=40, max_seconds=3.2),
        coefficients=13,
        recurrent=RecurrentConfig(hidden_dim=48, bidirectional=True),
    )
    text = TextEncoderConfig(
        vocab_size=2048,
        max_length=TOKENS,
        embed_dim=64,
        mlp_dim=192,
        num_layers=2,
        num_heads=4,
        activation="gelu_tanh",
        causal=False,
        projection_dim=0,
    )
    heads = (
        Classification(tuple(MOODS), name="mood", field="emotion", stream="fused"),
        Classification(_wants(), name="want", field="category", stream="text"),
    )
    rate = OptimizerConfig(method="muon", learning_rate=2e-3, warmup_steps=30, final_fraction=0.03)
    return config.view(
        Experiment(
            name="service",
            model=JointConfig(
                (Tower("voice", voice, "voice"), Tower("text", text, "tokens")),
                heads,
                Mixing(dim=64, dropout=0.2),
            ),
            data=DataConfig(
                root=str(DATA),
                sources=(_calls("train"), _questions("train")),
                evaluation=(_calls("val"), _questions("test")),
                max_tokens=TOKENS,
                tiling=TilingConfig(tile_size=8),  # rows have a tile, even if nothing is on it
            ),
            stages=(
                Stage("learn", steps=400, batch_size=32, objective=Heads(("mood", "want")), optimizer=rate),
            ),
            loop=LoopConfig(log_every=20, checkpoint_every=1000),
            evaluation=EvaluationConfig(task=Labels(head="", groups=("gender",)), batch_size=64),
        )
    )


def _wants():
    """The classes of questions, those of the training file."""
    with open(DATA / "banking77/train.csv", encoding="utf-8", newline="") as file:
        return tuple(sorted({row["category"] for row in csv.DictReader(file)}))


def _calls(split):
    voices = RecordsConfig(
        "voices",
        f"nemo_emotion/{split}.json",
        labels=("emotion", "gender"),
        media=(WaveConfig("voice", field="audio"),),
    )
    lines = RecordsConfig(
        "lines",
        f"meld_text/{'test' if split == 'val' else split}_sent_emo.csv",
        text="Utterance",
        labels=("Emotion",),
    )
    kinds = tuple(SameKind((ours,), (theirs,)) for ours, theirs in MOODS.items())
    # Few voices: in training each comes with several lines, or the lines would be learnt by heart.
    partners = 1 if split == "val" else 12
    return MatchedConfig("calls", voices, lines, ("emotion", "Emotion"), kinds, AGREEMENT, partners)


def _questions(split):
    return RecordsConfig("questions", f"banking77/{split}.csv", text="text", labels=("category",))
