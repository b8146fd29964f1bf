"""What the router is given to do: its z-loss, its gates, its noise.

    python -m vl_jax sweep --config=ablations/router --sweep=z_loss --workdir=runs/z_loss
    python -m vl_jax sweep --config=ablations/router --sweep=gates --workdir=runs/gates
    python -m vl_jax sweep --config=ablations/router --sweep=noise --workdir=runs/noise

``ablations/router:4`` is four times as long.
"""

from vl_jax import config
from vl_jax.ablation.miniature import EQUAL, LOSS, MAXVIO, experiment
from vl_jax.ablation.plan import Ablation, Arm, Claim

_MOE = "model.moe"


def ablation_z_loss():
    """Large logits of the router cost nothing, a little, or much."""
    return Ablation(
        arms=tuple(
            Arm(name, {f"{_MOE}.balance.z_weight": weight})
            for name, weight in (("none", 0.0), ("published", 1e-3), ("strong", 1e-1))
        ),
        metric=LOSS,
        better="lower",
        claims=(
            Claim(
                *("published", "none", LOSS, "not_higher"),
                margin=0.02,
                says="the router's z-loss costs no quality (ST-MoE, arXiv 2202.08906, section 3)",
            ),
            Claim("strong", "none", LOSS, "open"),
            Claim("published", "none", MAXVIO, "open"),
        ),
        equal=EQUAL,
        says="Does it cost anything to keep the router's logits small?",
    )


def ablation_gates():
    """How much a chosen expert weighs: its probability, its share of the chosen ones, or a sigmoid's."""
    return Ablation(
        arms=(
            Arm("softmax", {f"{_MOE}.gates.normalize": False}),
            Arm("softmax_shares", {f"{_MOE}.gates.normalize": True}),
            Arm("sigmoid_shares", {f"{_MOE}.gates.normalize": True, f"{_MOE}.gates.score": "sigmoid"}),
            Arm("chosen_logits", {f"{_MOE}.gates.normalize": False, f"{_MOE}.scheme": "top_k_softmax"}),
        ),
        metric=LOSS,
        better="lower",
        claims=(
            Claim(
                *("softmax_shares", "softmax", LOSS, "open"),
                says="DeepSeekMoE leaves gates as they are (arXiv 2401.06066), DeepSeek-V3 divides by their "
                "sum (arXiv 2412.19437, section 2.1.2); neither shows what it gains",
            ),
            Claim(
                *("sigmoid_shares", "softmax_shares", LOSS, "open"),
                says="no difference (Wang et al. 2024, arXiv 2408.15664: perplexity 9.604 and 9.599)",
            ),
            Claim(
                "chosen_logits", "softmax_shares", LOSS, "open", says="on paper the two are the same function"
            ),
        ),
        equal=EQUAL,
        says="What should a chosen expert's output be multiplied by?",
    )


def ablation_noise():
    """No noise on the router's logits, a fixed one, or one that it learns; nothing else balances experts."""
    same = {f"{_MOE}.gates.normalize": False, f"{_MOE}.balance.weight": 0.0}
    silent = "(('importance_weight', 0.0), ('load_weight', 0.0))"
    return Ablation(
        arms=(
            Arm("none", {**same, f"{_MOE}.scheme": "top_k_softmax"}),
            Arm("fixed", {**same, f"{_MOE}.scheme": "v_moe", f"{_MOE}.options": silent}),
            Arm("learned", {**same, f"{_MOE}.scheme": "noisy_top_k", f"{_MOE}.options": silent}),
        ),
        metric=LOSS,
        better="lower",
        claims=(
            Claim(
                *("learned", "none", MAXVIO, "lower"),
                says="noise helps to balance experts (Shazeer et al. 2017, arXiv 1701.06538, section 2.1)",
            ),
            Claim("learned", "none", LOSS, "open"),
            Claim(
                "fixed", "none", LOSS, "open", says="V-MoE adds noise of 1/E (arXiv 2106.05974, section 2)"
            ),
            Claim("fixed", "none", MAXVIO, "open"),
        ),
        equal=EQUAL,
        tolerance=0.02,  # learned noise doubles the router's columns
        says="Does noise in the choice of experts help?",
    )


def get_config(scale: str = "1"):
    """The experiment, ``scale`` times as long."""
    return config.view(experiment(scale))
