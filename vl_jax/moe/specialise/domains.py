"""Domains: fields of application, such as medicine, and the experts that are for each.

A row may be told its domain (a label, see ``InDomainConfig``). In every sparse layer then

    picked     its tokens may take the experts of its domain alone     (``routing.EXCLUDED``)
    weight     a loss draws the router to them                         (``routing.TOWARDS``)

With the loss alone the router learns from labels whose tokens are whose, and nobody has to say a domain when
the model is used.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vl_jax.batch import Given
from vl_jax.data.sample import BadSample, Sample
from vl_jax.data.sources.in_domain import DOMAIN
from vl_jax.moe.routing import EXCLUDED, TOWARDS, State
from vl_jax.moe.stacks import Stack, Stacks


@dataclasses.dataclass(frozen=True)
class Domain:
    """A field of application."""

    name: str
    experts: tuple[int, ...]  # that are for it, in every sparse layer; domains may share some


@dataclasses.dataclass(frozen=True)
class DomainsConfig:
    """The domains that a model knows. It is the ``RowField`` of their label too."""

    domains: tuple[Domain, ...]
    picked: bool = True  # whether tokens of a row may take the experts of its domain alone
    weight: float = 0.0  # of the loss that draws the router to the experts of a row's domain
    others: tuple[int, ...] = ()  # experts that rows may take whose domain nobody says; empty: all

    def __post_init__(self):
        names = [domain.name for domain in self.domains]
        if not names or len(set(names)) < len(names) or not all(names):
            raise ValueError(f"domains are named {names}: there must be at least one, with different names")
        for domain in self.domains:
            if not domain.experts:
                raise ValueError(f"domain {domain.name!r} has experts=(): it needs one at least")
        if self.weight < 0:
            raise ValueError(f"weight={self.weight} of the domains' loss must be >= 0")

    @property
    def name(self) -> str:
        """Of the label, in ``Batch.labels``."""
        return DOMAIN

    @property
    def shape(self) -> tuple[int, ...]:
        """A label is one number."""
        return ()

    @property
    def dtype(self) -> str:
        """The number of a domain."""
        return "int32"

    def read(self, sample: Sample) -> np.ndarray | None:
        """The number of the sample's domain; see ``RowField``.

        Raises:
          BadSample: it is none of the domains.
        """
        value, names = sample.labels.get(DOMAIN), [domain.name for domain in self.domains]
        if value is None:
            return None
        if value not in names:
            known = ", ".join(names)
            raise BadSample("unknown_label", f"sample {sample.id}: domain {value!r} is none of {known}")
        return np.asarray(names.index(value), np.int32)

    def check(self, stacks: Stacks) -> None:
        """Makes sure that a model has the experts.

        Raises:
          ValueError: it has not; names the domain.
        """
        if not stacks:
            raise ValueError("domains need experts: no encoder of the model has sparse layers")
        every = [(f"domain {d.name!r}", d.experts) for d in self.domains] + [("others", self.others)]
        for name, stack in stacks.items():
            last = stack.moe.num_experts - 1
            for what, experts in every:
                wrong = [number for number in experts if not 0 <= number <= last]
                if wrong:
                    raise ValueError(f"{what}: {wrong[0]} is no expert of {name}; expected 0 to {last}")


def with_domains(
    state: State, label: Given | None, config: DomainsConfig, stack: Stack, *, groups: int
) -> State:
    """The routing state of a stack, with what follows from the domains of the rows.

    Args:
      state: [L ...] each.
      label: of the rows; None where nobody says any.
      groups: routing groups; those of one row stand together.
    """
    if label is None:
        rows = jnp.full((1,), len(config.domains), jnp.int32)
    else:
        rows = jnp.where(label.present, label.values, len(config.domains))

    def given(table: np.ndarray) -> jax.Array:
        """[L G 1 E] of a table with a row for each domain, and one for rows without."""
        by_row = jnp.asarray(table)[rows]
        by_group = jnp.repeat(by_row, groups // by_row.shape[0], axis=0)[None, :, None]
        return jnp.broadcast_to(by_group, (len(stack.layers), *by_group.shape[1:]))

    of_rows = _own(config, stack.moe.num_experts)
    found = dict(state)
    if config.picked or config.others:
        closed = np.zeros_like(of_rows)
        if config.picked:
            closed[:-1] = ~of_rows[:-1]
        if config.others:
            closed[-1] = ~of_rows[-1]
        excluded = given(closed)
        found[EXCLUDED] = state[EXCLUDED] | excluded if EXCLUDED in state else excluded
    if config.weight:
        drawn = np.where(of_rows, np.float32(config.weight), np.float32(0))
        drawn[-1] = 0
        found[TOWARDS] = given(drawn)
    return found


def _own(config: DomainsConfig, num_experts: int) -> np.ndarray:
    """bool[D+1 E] the experts of every domain, and at last those of rows without one."""
    sets = [*(domain.experts for domain in config.domains), config.others]
    return np.stack([np.isin(np.arange(num_experts), experts) for experts in sets])
