"""Routing schemes in a decoder, against each other and against a dense layer of the same work.

    python -m vl_jax sweep --config=ablations/schemes --sweep=schemes --workdir=runs/schemes

Expert choice and soft experts look at later tokens, which a decoder must not do: ``ablations/seeing`` has
them. ``ablations/schemes:4`` is four times as long.
"""

from vl_jax import config
from vl_jax.ablation.miniature import LOSS, MAXVIO, experiment
from vl_jax.ablation.plan import Ablation, Arm, Claim

# A token takes one expert of four, twice as wide: the parameters and the work of two of eight.
_ONE = {
    "model.moe.num_experts": 4,
    "model.moe.top_k": 1,
    "model.moe.expert_dim": 64,
    "model.moe.gates.normalize": False,  # the only gate would always be 1, and the router learn nothing
}


def ablation_schemes():
    """A dense layer, a hash of the token, the best expert, and the two best with the second one at random."""
    return Ablation(
        arms=(
            Arm("dense", {"model.language.num_dense_layers": 2}),
            Arm("hash", {**_ONE, "model.moe.scheme": "hash"}),
            Arm("switch", {**_ONE, "model.moe.scheme": "switch"}),
            Arm("gshard", {"model.moe.scheme": "gshard"}),
        ),
        metric=LOSS,
        better="lower",
        claims=(
            Claim(
                *("hash", "dense", LOSS, "lower"),
                says="experts are better than a dense layer of the same work (DeepSeekMoE, arXiv 2401.06066, "
                "table 1: loss 1.932 against 2.060)",
            ),
            Claim(
                *("switch", "hash", LOSS, "lower"),
                says="a learned choice is better than a hash (the same table: 1.881 against 1.932)",
            ),
            Claim(
                *("gshard", "switch", LOSS, "lower"),
                says="two experts of a token are better than one (the same table: 1.867 against 1.881)",
            ),
            Claim("gshard", "switch", MAXVIO, "open"),
        ),
        equal=("steps", "tokens", "flops"),
        tolerance=0.05,  # of the router, which a dense layer has not
        says="Which way to choose experts is best, and is any better than none?",
    )


def get_config(scale: str = "1"):
    """The experiment, ``scale`` times as long."""
    return config.view(experiment(scale))
