"""A frozen language model learns to see: through a gate that opens, or an open door?

    python -m vl_jax sweep --config=ablations/gate --sweep=tanh_gate --workdir=runs/tanh_gate

It learns questions without pictures first, and is frozen then; what is learned after that is to see, and to
look. ``ablations/gate:4`` is four times as long.
"""

import dataclasses

from vl_jax import config
from vl_jax.ablation import miniature
from vl_jax.ablation.miniature import LOSS
from vl_jax.ablation.plan import Ablation, Arm, Claim
from vl_jax.data.sources.scenes import SceneTextsConfig
from vl_jax.fusion.gate import CrossModalGateConfig
from vl_jax.model import FusionConfig


def ablation_tanh_gate():
    """A gate that begins closed and learns to open, and one that is open from the first step."""
    return Ablation(
        arms=(
            Arm("opens", {"model.fusion.gate.opens": True}),
            Arm("open", {"model.fusion.gate.opens": False}),
        ),
        metric=LOSS,
        better="lower",
        claims=(
            Claim(
                *("opens", "open", LOSS, "lower"),
                says="a gate that opens is better and steadier (Flamingo, arXiv 2204.14198, table 3: 70.7 "
                "against 66.5)",
            ),
            Claim("opens", "open", "grad_norm", "open"),
        ),
        equal=("steps", "samples", "tokens", "parameters", "flops"),
        says="Should pictures come in through a gate that begins closed?",
    )


def get_config(scale: str = "1"):
    """The experiment, ``scale`` times as long."""
    gate = CrossModalGateConfig(num_heads=2, head_dim=24)
    questions = SceneTextsConfig("questions", miniature.scenes("scenes", 3), questions=True)
    return config.view(
        miniature.experiment(
            scale,
            model=dataclasses.replace(miniature.MODEL, fusion=FusionConfig("gated", gate)),
            data=miniature.data(sources=(miniature.scenes("train", 1), questions)),
            stages=(
                miniature.stage("language", scale, steps=60, sources=("questions",)),
                miniature.stage(
                    "see",
                    scale,
                    steps=120,
                    sources=("train",),
                    trainable=("encoder/.*", "adapter/.*", "language/.*gate.*"),
                ),
            ),
        )
    )
