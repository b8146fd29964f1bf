"""Whether the figures that a plan names can be there, asked before anything runs."""

from __future__ import annotations

from collections.abc import Iterable

from vl_jax import parts
from vl_jax.ablation.plan import Ablation
from vl_jax.experiment import Experiment
from vl_jax.schema import ConfigError


def metrics_of(plan: Ablation) -> list[str]:
    """The figures that a plan decides by, each once."""
    return list(dict.fromkeys([plan.metric, *map(plan.metric_of, plan.claims)]))


def check_sources(plan: Ablation, experiments: Iterable[Experiment]) -> None:
    """Refuses a metric of a source that is not evaluated, or not while training; nothing has run then.

    Raises:
      ConfigError: names the metric, and what there is.
    """
    for experiment in experiments:
        known = [source.name for source in experiment.data.evaluation]
        for metric in metrics_of(plan):
            task, colon, score = metric.partition(": ")
            source = task if colon else metric.split("/")[1] if metric.startswith("eval/") else None
            if source is None:
                continue
            if source not in known:
                more = f"; {parts.near(source, known)}" if known else "; there is none"
                raise ConfigError(f"metric={metric!r}: {source!r} is no source of data.evaluation{more}")
            if not colon and not experiment.loop.evaluate_every:
                raise ConfigError(
                    f"metric={metric!r} is measured while training, but loop.evaluate_every=0; set it, or "
                    f"take '{source}: {metric.rpartition('/')[2]}', which is measured in the end"
                )
