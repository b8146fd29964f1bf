"""Adapters over weights in int8: a model that knows scenes in English learns new colours, shapes and Chinese.

    python -m vl_jax sweep --config=ablations/int8 --sweep=int8_adapters --workdir=runs/int8_adapters

As in ``ablations/lora``, the vectors of tokens train in every arm. What memory the arms need at a larger size
is measured by ``benchmark quantize``. ``ablations/int8:4`` is four times as long.
"""

from vl_jax import config
from vl_jax.ablation import miniature
from vl_jax.ablation.miniature import LOSS
from vl_jax.ablation.plan import Ablation, Arm, Claim
from vl_jax.train.lora import LoraConfig

_ADAPT = "stages.adapt"
_EVERY = ("attention", "dense", "routed", "projector", "vision")


def ablation_int8_adapters():
    """All weights, adapters, adapters over int8, and those of half of the experts."""
    return Ablation(
        arms=(
            Arm("all_weights", {f"{_ADAPT}.lora": "None", f"{_ADAPT}.trainable": "('.*',)"}),
            Arm("adapters"),
            Arm("adapters_int8", {f"{_ADAPT}.lora.base": "int8"}),
            Arm(
                "half_of_the_experts_int8",
                {f"{_ADAPT}.lora.base": "int8", f"{_ADAPT}.lora.only.experts": "(0, 1, 2, 3)"},
            ),
        ),
        metric=LOSS,
        better="lower",
        claims=(
            Claim(
                *("adapters_int8", "adapters", LOSS, "not_higher"),
                margin=0.02,
                says="rounding what is frozen costs nothing that adapters do not make good (QLoRA, arXiv "
                "2305.14314, section 4, for 4 bits)",
            ),
            Claim(
                *("adapters_int8", "all_weights", LOSS, "not_higher"),
                margin=0.045,  # 6 % of what training of all weights came to in ``lora_rank``
                says="reaches 94 % of full tuning at 12 times less memory (an article on DeepSeek-VL, which "
                "gives no evidence)",
            ),
            Claim(
                *("half_of_the_experts_int8", "adapters_int8", LOSS, "open"),
                says="adapters of chosen experts (the same article); which half is chosen is arbitrary here",
            ),
        ),
        equal=("steps", "samples", "tokens", "parameters"),
        says="What do adapters lose when the weights beneath them are in int8?",
    )


def get_config(scale: str = "1"):
    """The experiment, ``scale`` times as long."""
    return config.view(miniature.adapting(scale, LoraConfig(rank=8, alpha=16.0, targets=_EVERY)))
