"""Weights rounded to int8 after training: what that costs a model with experts, and a dense one.

    python -m vl_jax sweep --config=ablations/int8_rounded --sweep=int8_rounded --workdir=runs/int8_rounded

The second stage is a step at a rate at which float32 does not move: it rounds what is frozen, as it begins,
and trains nothing. ``ablations/int8_rounded:4`` is four times as long.
"""

from vl_jax import config
from vl_jax.ablation import miniature
from vl_jax.ablation.miniature import LOSS
from vl_jax.ablation.plan import Ablation, Arm, Claim
from vl_jax.train.lora import LoraConfig
from vl_jax.train.optimizer import OptimizerConfig

_INT8 = {"stages.round.lora.base": "int8"}
# As wide as the two experts of 32 that a token takes: as many weights are in use.
_DENSE = {"model.language.num_dense_layers": 2}


def ablation_int8_rounded():
    """A model with experts and a dense one of as many active parameters, each as trained and rounded."""
    return Ablation(
        arms=(
            Arm("experts"),
            Arm("experts_int8", _INT8),
            Arm("dense", _DENSE),
            Arm("dense_int8", {**_DENSE, **_INT8}),
        ),
        metric=LOSS,
        better="lower",
        claims=(
            Claim(
                *("experts_int8", "experts", LOSS, "higher"),
                says="int8 costs a model with experts about 4 % (an article on DeepSeek-VL, which gives no "
                "evidence). MoEQuant (arXiv 2505.03804) lost that much in 4 bits",
            ),
            Claim(
                *("dense_int8", "dense", LOSS, "not_higher"),
                margin=0.01,
                says="and a dense one less than 1 % (the same)",
            ),
            Claim("experts", "dense", LOSS, "open"),
        ),
        equal=("steps", "samples", "tokens", "active_parameters"),
        tolerance=0.05,  # experts have a router
        says="Does rounding to int8 cost a model with experts more than a dense one?",
    )


def get_config(scale: str = "1"):
    """The experiment, ``scale`` times as long."""
    round_ = miniature.stage(
        "round",
        scale,
        steps=1,
        trainable=(),
        hold=True,
        lora=LoraConfig(rank=1, alpha=1.0, targets=("attention",)),
        optimizer=OptimizerConfig(learning_rate=1e-30, schedule="constant"),
    )
    return config.view(miniature.experiment(scale, stages=(miniature.stage("train", scale), round_)))
