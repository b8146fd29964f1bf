"""How many slots an expert has, counted in integers: the same number wherever it is asked for.

    slots(t) = ceil(factor * K / E * t)      for t tokens; the factor is a fraction, 1.2 is 6/5

The host lays out buffers by it, and devices decide by it who is dropped. If one of them counted in floats,
they would differ by one where the product is a whole number: rows would be lost, or land in another's slot.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

FINEST = 10_000  # the largest denominator of a factor


def as_fraction(factor: float) -> Fraction:
    """The fraction that a factor stands for: the nearest one with a denominator up to ``FINEST``.

    So 1.2 is 6/5 and 1/3 is a third, although no float is either; never zero.
    """
    return Fraction(factor).limit_denominator(FINEST) or Fraction(1, FINEST)


def ceil_times(count: Any, ratio: Fraction | int, *, most: int) -> Any:
    """``ceil(count * ratio)``, exactly, without an intermediate result of 2**31 or more.

    It is a long division: ``count`` is taken digit by digit, in a base so small that the remainder times the
    base stays below 2**30. One digit is enough up to ``most`` * denominator = 2**30.

    Args:
      count: an int, or an int32 array of numpy or JAX; from 0 to ``most``.
      most: less than 2**31, as the result for it must be too.

    Raises:
      ValueError: the denominator is above 2**29.
    """
    below = ratio.denominator
    if below > 2**29:
        raise ValueError(f"the share of slots {ratio} has a denominator above {2**29}")
    whole, part = divmod(ratio.numerator, below)
    base, digits = 2**30 // below, 1
    while base**digits <= most:
        digits += 1
    quotient = left = 0 * count
    for place in reversed(range(digits)):
        total = left * base + count // base**place % base * part
        quotient, left = quotient * base + total // below, total % below
    return count * whole + quotient + (left + below - 1) // below
