"""Scaling curves in miniature: how loss falls with width, steps, experts and their granularity.

    python -m vl_jax sweep --config=experiments/ablations/scaling.py --sweep=size --workdir=runs/size
    python -m vl_jax sweep --config=experiments/ablations/scaling.py --sweep=experts --workdir=runs/experts
    python -m vl_jax sweep --config=experiments/ablations/scaling.py --sweep=grain --workdir=runs/grain

The model and the scenes of ``balance.py``; what counts is the loss on scenes that it never saw. The published
exponents are of models a thousand times as large, so that only their signs are expected here.
"""

from vl_jax import config
from vl_jax.ablation.scaling.declared import Axis, Expect, Scaling
from vl_jax.ablation.scaling.law import Law, Term

STEPS = 150
HOFFMANN = "loss falls with parameters, 0.34, and with tokens, 0.28 (Hoffmann et al. 2022, arXiv 2203.15556)"


def width(dim: int) -> dict:
    """A decoder and experts of another width."""
    language = "model.language"
    return {
        f"{language}.embed_dim": dim,
        f"{language}.mlp_dim": 2 * dim,
        "model.moe.expert_dim": 2 * dim // 3,
    }


def experts(num: int) -> dict:
    """More experts, of which a token takes two still: more parameters, but no more active ones."""
    return {"model.moe.num_experts": num}


def grain(parts: int) -> dict:
    """Experts of 64 units cut into parts, of which a token takes as many: equal parameters and operations."""
    moe = "model.moe"
    return {f"{moe}.num_experts": 4 * parts, f"{moe}.top_k": parts, f"{moe}.expert_dim": 64 // parts}


def scaling_size():
    """Active parameters against tokens."""
    return Scaling(
        axes=(
            Axis("size", {str(dim): width(dim) for dim in (24, 48, 96)}),
            Axis("tokens", {f"x{times}": {"stages.train.steps": times * STEPS} for times in (1, 2, 4)}),
        ),
        seeds=1,
        expects=(Expect("alpha", low=0.0, says=HOFFMANN), Expect("beta", low=0.0, says=HOFFMANN)),
        says="How does loss fall with active parameters and with tokens?",
    )


def scaling_experts():
    """Active parameters against experts."""
    claim = "loss falls with the number of experts too (Clark et al. 2022, arXiv 2202.01169)"
    return Scaling(
        axes=(
            Axis("size", {str(dim): width(dim) for dim in (24, 48, 96)}),
            Axis("experts", {str(num): experts(num) for num in (4, 8, 16)}),
        ),
        seeds=1,
        expects=(Expect("beta", low=0.0, says=claim),),
        says="Is it worth it to have more experts, of which a token takes no more?",
    )


def scaling_grain():
    """The granularity of experts, at equal cost; by a law of fewer parameters than there are points."""
    claim = "finer experts lower the loss (Krajewski et al. 2024, arXiv 2402.07871)"
    return Scaling(
        axes=(Axis("granularity", {str(parts): grain(parts) for parts in (2, 4, 8, 16)}),),
        law=Law("plain power", (Term("A", {"granularity": "gamma"}),)),
        seeds=2,
        expects=(Expect("gamma", low=0.0, says=claim),),
        says="Is it worth it to cut experts into finer ones?",
    )


def get_config(scale: str = "1"):
    """The experiment of ``balance.py``; the tokens of a size curve are ``scale`` times ``STEPS``."""
    changes = [("name", "scaling"), ("stages.train.steps", str(round(STEPS * float(scale))))]
    return config.view(config.load("ablations/balance", changes))
