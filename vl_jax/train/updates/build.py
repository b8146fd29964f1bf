"""Ways of fusing gradients, by config: ``Stage.gradients``."""

from __future__ import annotations

from typing import Annotated

from vl_jax.schema import Open
from vl_jax.train.updates.fusing import GradientFusion
from vl_jax.train.updates.gradnorm import GradNorm
from vl_jax.train.updates.mmpareto import MMPareto
from vl_jax.train.updates.ogm_ge import OGMGE
from vl_jax.train.updates.pcgrad import PCGrad
from vl_jax.train.updates.reweighted import Reweighted

AnyFusing = Annotated[
    Reweighted | OGMGE | PCGrad | MMPareto | GradNorm | GradientFusion,
    Open("gradient fusion", ("at", "init", "__call__")),
]
