"""Groups and modules of one name: the encoders of the modalities that have losses of their own."""

from __future__ import annotations

from vl_jax.train.updates.fusing import Facts


def own_modules(facts: Facts, who: str) -> tuple[str, ...]:
    """The groups that have a module of their name which trains.

    Raises:
      ValueError: there is none.
    """
    found = tuple(name for name in facts.names if name in facts.grams)
    if not found:
        groups, modules = ", ".join(facts.names), ", ".join(facts.grams)
        raise ValueError(
            f"gradients={who} needs groups that are named as towers are: groups are {groups}; what trains is "
            f"{modules}"
        )
    return found
