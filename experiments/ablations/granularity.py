"""How fine experts are cut, how many there are, and how many a token takes.

    python -m vl_jax sweep --config=ablations/granularity --sweep=granularity --workdir=runs/granularity
    python -m vl_jax sweep --config=ablations/granularity --sweep=experts --workdir=runs/experts
    python -m vl_jax sweep --config=ablations/granularity --sweep=top_k --workdir=runs/top_k

``ablations/granularity:4`` is four times as long.
"""

from vl_jax import config
from vl_jax.ablation.miniature import EQUAL, LOSS, experiment
from vl_jax.ablation.plan import Ablation, Arm, Claim


def _experts(number: int, top_k: int, width: int, normalize: bool = True) -> dict:
    return {
        "model.moe.num_experts": number,
        "model.moe.top_k": top_k,
        "model.moe.expert_dim": width,
        "model.moe.gates.normalize": normalize,
    }


def ablation_granularity():
    """The same hidden units in fewer and wider experts, or in more and narrower ones."""
    return Ablation(
        arms=(
            Arm("coarse", _experts(8, 2, 32)),
            Arm("middle", _experts(16, 4, 16)),
            Arm("fine", _experts(32, 8, 8)),
        ),
        metric=LOSS,
        better="lower",
        claims=(
            Claim(
                *("middle", "coarse", LOSS, "open"),
                says="finer experts are better (DeepSeekMoE, arXiv 2401.06066, section 4.4); in small and "
                "short runs the opposite was found",
            ),
            Claim("fine", "coarse", LOSS, "open", says="the same, one step further"),
        ),
        equal=EQUAL,
        tolerance=0.05,  # more experts need a wider router
        says="Is it better to cut experts finer, at the same number of parameters and operations?",
    )


def ablation_experts():
    """More experts of one size, of which a token takes as many as before."""
    return Ablation(
        arms=(
            Arm("four", _experts(4, 2, 32)),
            Arm("eight", _experts(8, 2, 32)),
            Arm("sixteen", _experts(16, 2, 32)),
        ),
        metric=LOSS,
        better="lower",
        claims=(
            Claim(
                *("eight", "four", LOSS, "open"),
                says="more experts are better at the same work per token (Switch, arXiv 2101.03961, section "
                "3.1); small studies with little data saw them get worse",
            ),
            Claim("sixteen", "four", LOSS, "open", says="the same, one step further"),
        ),
        equal=("steps", "tokens", "active_parameters", "flops"),
        tolerance=0.05,
        says="Do more experts help if a token takes no more of them?",
    )


def ablation_top_k():
    """One, two or four of eight experts for a token; gates stay as they are, so that the router learns."""
    return Ablation(
        arms=tuple(
            Arm(name, _experts(8, number, 32, normalize=False))
            for name, number in (("one", 1), ("two", 2), ("four", 4))
        ),
        metric=LOSS,
        better="lower",
        claims=(
            Claim(
                *("two", "one", LOSS, "lower"),
                says="two experts are better than one (MoE-LLaVA, arXiv 2401.15947, ablations)",
            ),
            Claim("four", "two", LOSS, "open"),
        ),
        equal=("steps", "tokens", "parameters"),
        says="How many experts should a token take, if work is no object?",
    )


def get_config(scale: str = "1"):
    """The experiment, ``scale`` times as long."""
    return config.view(experiment(scale))
