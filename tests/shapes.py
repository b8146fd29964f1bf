"""How arguments are checked in tests: those of every function that other code can call."""

from collections.abc import Callable

from beartype import BeartypeConf, beartype

_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int will do for a float


def check(function: Callable) -> Callable:
    """The function with its arguments checked, unless it is made anew at every call of another."""
    return function if "<locals>" in function.__qualname__ else _checked(function)
