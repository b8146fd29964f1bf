"""Scaling laws: sums of products of powers, as values.

    L = E + A / size^alpha + B / tokens^beta

is three terms: a constant, one power of the size, one power of the tokens. An exponent may also change with
another variable, ``size^(alpha + c log experts)``: then it has a second power, ``("size", "experts"): "c"``.
A law of one's own is a ``Law`` in an experiment file; nothing else knows the laws below by name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from vl_jax import parts
from vl_jax.evaluate.statistics import Values

_NAME = re.compile(r"[A-Za-z]\w*")


@dataclasses.dataclass(frozen=True)
class Term:
    """``coefficient / (x^p * y^q * ...)``; without powers, a constant.

    Attributes:
      coefficient: the name of what is divided, which is above zero.
      powers: names of exponents by variable, or by two variables whose logarithms are multiplied. An exponent
        above zero makes the term smaller as the variable grows.
    """

    coefficient: str
    powers: Mapping[str | tuple[str, ...], str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Law:
    """What is fitted: the sum of some terms."""

    name: str
    terms: tuple[Term, ...]
    source: str = ""  # who found it

    def __post_init__(self):
        names = self.parameters
        twice = next((name for name in names if names.count(name) > 1 and name in self.coefficients), None)
        wrong = next((name for name in names if not _NAME.fullmatch(name)), None)
        if not self.terms or twice or wrong is not None:
            which = f"two coefficients are called {twice!r}" if twice else f"{wrong!r} is no name"
            raise ValueError(f"law {self.name!r}: {which if self.terms else 'it has no term'}")
        if not self.variables:
            raise ValueError(f"law {self.name!r}: no term has a variable")

    @property
    def coefficients(self) -> tuple[str, ...]:
        """Their names, one for each term."""
        return tuple(term.coefficient for term in self.terms)

    @property
    def exponents(self) -> tuple[str, ...]:
        """Their names; one may stand in several terms."""
        return tuple(dict.fromkeys(name for term in self.terms for name in term.powers.values()))

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of all that is fitted: coefficients, then exponents."""
        return (*self.coefficients, *self.exponents)

    @property
    def variables(self) -> tuple[str, ...]:
        """What the law is a function of."""
        found = (name for term in self.terms for key in term.powers for name in _tuple(key))
        return tuple(dict.fromkeys(found))

    @property
    def equation(self) -> str:
        """The law in one line."""
        return "L = " + " + ".join(map(_text, self.terms))

    def design(self, xs: Mapping[str, Values]) -> Float[np.ndarray, "K P J"]:
        """What the parameters are multiplied by to give the logarithms of the terms.

        Args:
          xs: by variable its values at P points, all above zero.

        Returns:
          For each of K terms, P points and J parameters; coefficients count by their logarithms.
        """
        names, logs = self.parameters, {name: np.log(np.asarray(x, float)) for name, x in xs.items()}
        count = len(next(iter(logs.values())))
        found = np.zeros((len(self.terms), count, len(names)))
        for k, term in enumerate(self.terms):
            found[k, :, names.index(term.coefficient)] = 1
            for key, exponent in term.powers.items():
                product = np.prod([logs[name] for name in _tuple(key)], axis=0)
                found[k, :, names.index(exponent)] -= product
        return found


def _tuple(key: str | tuple[str, ...]) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else key


def _text(term: Term) -> str:
    if not term.powers:
        return term.coefficient
    factors = []
    for key, exponent in term.powers.items():
        first, *others = _tuple(key)
        power = f"({exponent} {' '.join(f'log {name}' for name in others)})" if others else exponent
        factors.append(f"{first}^{power}")
    joined = " ".join(factors)
    return f"{term.coefficient} / {joined}" if len(factors) == 1 else f"{term.coefficient} / ({joined})"


_SIZE = Term("A", {"size": "alpha"})
_TOKENS = Term("B", {"tokens": "beta"})
LAWS = {
    law.name: law
    for law in (
        Law("chinchilla", (Term("E"), _SIZE, _TOKENS), "Hoffmann et al. 2022, arXiv 2203.15556, eq. 10"),
        Law(
            "separable",
            (Term("A", {"size": "alpha", "experts": "beta"}),),
            "Clark et al. 2022, arXiv 2202.01169, the separable law, with the number of experts as it is",
        ),
        Law(
            "routed",
            (Term("A", {"size": "alpha", "experts": "beta", ("size", "experts"): "c"}),),
            "Clark et al. 2022, arXiv 2202.01169, with their interaction, and the number of experts as it is",
        ),
        Law(
            "fine_grained",
            (Term("E"), _SIZE, Term("G", {"granularity": "gamma", "size": "alpha"}), _TOKENS),
            "Krajewski et al. 2024, arXiv 2402.07871",
        ),
        Law(
            "joint",
            (
                Term("E"),
                Term("A", {"size": "alpha", "experts": "delta", ("size", "experts"): "c"}),
                Term("B", {"tokens": "beta", "experts": "omega", ("tokens", "experts"): "d"}),
            ),
            "Ludziejewski et al. 2025, arXiv 2502.05172, with the number of experts as it is",
        ),
    )
}


def power_law(variable: str) -> Law:
    """A power of one variable above a loss that nothing can reduce."""
    terms = (Term("E"), Term("A", {variable: "alpha"}))
    return Law("power", terms, "Henighan et al. 2020, arXiv 2010.14701")


def find(name: str, variables: Sequence[str]) -> Law:
    """A law by its name; without one, the first that has just these variables.

    Raises:
      ValueError: there is none, or it has a variable that does not vary.
    """
    known = ["power", *LAWS]
    if name not in ("", *known):
        raise ValueError(f"law={name!r}: {parts.near(name, known)}; or give a Law")
    if len(variables) == 1 and name in ("", "power"):
        return power_law(variables[0])
    if not name:
        found = next((law for law in LAWS.values() if set(law.variables) == set(variables)), None)
        if found is None:
            said = "; ".join(f"{law.name}: {', '.join(law.variables)}" for law in LAWS.values())
            raise ValueError(f"no law is of {', '.join(variables)} ({said}); give a Law of your own")
        return found
    if name == "power" or set(LAWS[name].variables) != set(variables):
        needs = "one variable" if name == "power" else ", ".join(LAWS[name].variables)
        raise ValueError(f"law={name!r} is of {needs}, but the axes vary {', '.join(variables)}")
    return LAWS[name]


def to_json(law: Law) -> dict[str, Any]:
    """A law as JSON values; two variables are joined by a space."""
    terms = [
        {"coefficient": t.coefficient, "powers": {" ".join(_tuple(k)): v for k, v in t.powers.items()}}
        for t in law.terms
    ]
    return {"name": law.name, "terms": terms, "source": law.source}


def from_json(tree: Mapping[str, Any]) -> Law:
    """The law that ``to_json`` wrote; KeyError, TypeError or ValueError if it is none."""
    terms = tuple(
        Term(t["coefficient"], {_key(text): exponent for text, exponent in t["powers"].items()})
        for t in tree["terms"]
    )
    return Law(tree["name"], terms, tree["source"])


def _key(text: str) -> str | tuple[str, ...]:
    names = tuple(text.split(" "))
    return names[0] if len(names) == 1 else names
