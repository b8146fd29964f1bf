"""A language model learns to see: in which stages, and with how much text beside the pictures?

    python -m vl_jax sweep --config=ablations/stages --sweep=stages --workdir=runs/stages
    python -m vl_jax sweep --config=ablations/stages --sweep=text_ratio --workdir=runs/text_ratio

It learns sentences about scenes first, without pictures; then pictures come. ``texts`` are held-out
sentences, and ``heldout`` held-out questions about pictures. ``ablations/stages:4`` is four times as long.
"""

from vl_jax import config
from vl_jax.ablation import miniature
from vl_jax.ablation.miniature import EQUAL, LOSS
from vl_jax.ablation.plan import Ablation, Arm, Claim
from vl_jax.data.sources.scenes import SceneTextsConfig

TEXT_LOSS = "texts: loss"
_PROJECTOR = "('adapter/.*',)"


def ablation_stages():
    """The projector alone first and then all, all from the start, or never anything but the projector."""
    return Ablation(
        arms=(
            Arm("all", {}),
            Arm("projector_first", {"stages.align.trainable": _PROJECTOR}),
            Arm(
                "projector_only", {"stages.align.trainable": _PROJECTOR, "stages.joint.trainable": _PROJECTOR}
            ),
        ),
        metric=LOSS,
        better="lower",
        claims=(
            Claim(
                *("projector_only", "all", LOSS, "higher"),
                says="the joint stage does the bulk of it (DeepSeek-VL, arXiv 2403.05525, section 4.3: 57.4 "
                "without, 62.4 with)",
            ),
            Claim(
                *("projector_first", "all", LOSS, "open"),
                says="a first stage for the projector helps a little (the same: 62.4 against 61.7), or is "
                "not needed (Prismatic, arXiv 2402.07865, section 4.1)",
            ),
        ),
        equal=EQUAL,
        says="Is a stage for the projector alone worth its steps?",
    )


def ablation_text_ratio():
    """Beside pictures no text, three samples in ten, or seven."""
    joint = "stages.joint"
    return Ablation(
        arms=(
            Arm("none", {f"{joint}.sources": "('train',)", f"{joint}.weights": "(1.0,)"}),
            Arm("text_30", {f"{joint}.weights": "(0.7, 0.3)"}),
            Arm("text_70", {f"{joint}.weights": "(0.3, 0.7)"}),
        ),
        metric=LOSS,
        better="lower",
        claims=(
            Claim(
                *("none", "text_70", TEXT_LOSS, "higher"),
                says="without text a model unlearns language (DeepSeek-VL, arXiv 2403.05525, section 3.2)",
            ),
            Claim("text_30", "text_70", TEXT_LOSS, "open", says="about 70 % of text keeps it (the same)"),
            Claim(
                "text_70",
                "none",
                LOSS,
                "open",
                says="and costs little of what is learned of pictures (the same)",
            ),
        ),
        equal=EQUAL,
        columns=(TEXT_LOSS,),
        says="How much text should go with pictures, so that language is kept?",
    )


def texts(name: str, seed: int, num_examples: int = 1_000_000) -> SceneTextsConfig:
    """Sentences about scenes of eight colours and six shapes, without pictures."""
    return SceneTextsConfig(name, miniature.scenes("scenes", seed, num_examples, num_colours=8, num_shapes=6))


def get_config(scale: str = "1"):
    """The experiment, ``scale`` times as long."""
    return config.view(
        miniature.experiment(
            scale,
            data=miniature.data(
                sources=(miniature.scenes("train", 1), texts("texts_train", 3)),
                evaluation=(miniature.scenes("heldout", 2, 256), texts("texts", 4, 256)),
                max_answer_tokens=32,
            ),
            stages=(
                miniature.stage("language", scale, steps=60, sources=("texts_train",)),
                miniature.stage("align", scale, steps=30, sources=("train",)),
                miniature.stage(
                    "joint", scale, steps=90, sources=("train", "texts_train"), weights=(0.7, 0.3)
                ),
            ),
        )
    )
