"""Some samples come without their pictures: what does that cost, and what does it give?

    python -m vl_jax sweep --config=ablations/image_dropout --sweep=image_dropout --workdir=runs/image_dropout

``heldout`` are questions with their pictures, ``blind`` the same without. ``ablations/image_dropout:4`` is
four times as long.
"""

from vl_jax import config
from vl_jax.ablation import miniature
from vl_jax.ablation.miniature import EQUAL, LOSS
from vl_jax.ablation.plan import Ablation, Arm, Claim
from vl_jax.data.sources.scenes import SceneTextsConfig

BLIND = "blind: loss"


def ablation_image_dropout():
    """None, one in fifty, or one in five without its picture."""
    return Ablation(
        arms=tuple(
            Arm(name, {"data.image_dropout_rate": rate})
            for name, rate in (("none", 0.0), ("two_percent", 0.02), ("twenty_percent", 0.2))
        ),
        metric=LOSS,
        better="lower",
        claims=(
            Claim(
                *("two_percent", "none", LOSS, "not_higher"),
                margin=0.03,
                says="as our own experiments do it, for the figure 'blind'; it should cost nothing",
            ),
            Claim(
                *("two_percent", "none", BLIND, "lower"),
                says="without it a model never saw a question alone, and what it says blind means little",
            ),
            Claim("twenty_percent", "none", LOSS, "open"),
        ),
        equal=EQUAL,
        columns=(BLIND,),
        says="What does it cost to withhold some pictures, and does the model know its ignorance then?",
    )


def get_config(scale: str = "1"):
    """The experiment, ``scale`` times as long."""
    blind = SceneTextsConfig("blind", miniature.scenes("scenes", 2, 256), questions=True)
    evaluation = (miniature.scenes("heldout", 2, 256), blind)
    return config.view(miniature.experiment(scale, data=miniature.data(evaluation=evaluation)))
