"""Balance of experts, and experts that all tokens share: what does each do, and at what price?

    python -m vl_jax sweep --config=ablations/balance --sweep=balance --workdir=runs/balance
    python -m vl_jax sweep --config=ablations/balance --sweep=shared --workdir=runs/shared

A small decoder learns scenes of one or two objects; what counts is its loss on scenes that it never saw. All
arms have the same steps, tokens, parameters and operations. ``ablations/balance:4`` is four times as long.
"""

from vl_jax import config
from vl_jax.ablation.miniature import EQUAL, LOSS, MAXVIO, experiment
from vl_jax.ablation.plan import Ablation, Arm, Claim


def _balance(scheme: str, weight: float, rate: float = 1e-3) -> dict:
    moe = "model.moe"
    return {
        f"{moe}.scheme": scheme,
        f"{moe}.balance.weight": weight,
        f"{moe}.balance.bias_rate": rate,
        f"{moe}.gates.score": "sigmoid",
    }


def ablation_balance():
    """What keeps experts busy: nothing, a weak loss, a strong one, or a bias without a loss."""
    return Ablation(
        arms=(
            Arm("none", _balance("top_k", 0.0)),
            Arm("loss_weak", _balance("top_k", 1e-2)),
            Arm("loss_strong", _balance("top_k", 1e-1)),
            Arm("bias", _balance("loss_free", 0.0, rate=1e-2)),
        ),
        metric=LOSS,
        better="lower",
        claims=(
            Claim(
                "bias",
                "none",
                MAXVIO,
                "lower",
                says="a bias balances experts without a loss (Wang et al. 2024, arXiv 2408.15664)",
            ),
            Claim(
                "bias",
                "loss_strong",
                LOSS,
                "open",
                says="at matched balance, the bias costs less quality than the loss (the same paper: "
                "perplexity 9.50 against 9.56 at 1B); whether 0.1 matches it is to be seen from MaxVio",
            ),
            Claim("bias", "loss_strong", MAXVIO, "open"),
            Claim(
                "bias", "none", LOSS, "open", says="against the view that no balancing is best at this size"
            ),
        ),
        equal=EQUAL,
        says="Does a bias balance experts as well as a loss does, and what does each cost in quality?",
    )


def ablation_shared():
    """One of the experts that a token takes is shared by all tokens, or none is."""
    moe = "model.moe"
    return Ablation(
        arms=(
            Arm("routed", {f"{moe}.shared.num": 0, f"{moe}.num_experts": 8, f"{moe}.top_k": 3}),
            Arm("shared", {f"{moe}.shared.num": 1, f"{moe}.num_experts": 7, f"{moe}.top_k": 2}),
        ),
        metric=LOSS,
        better="lower",
        claims=(
            Claim(
                "shared",
                "routed",
                LOSS,
                "open",
                says="shared experts help (DeepSeekMoE, arXiv 2401.06066); smaller studies do not confirm it",
            ),
        ),
        equal=EQUAL,
        tolerance=0.01,
        says="Is it worth it that all tokens share one of their experts?",
    )


def get_config(scale: str = "1"):
    """The experiment, ``scale`` times as long."""
    return config.view(experiment(scale))
