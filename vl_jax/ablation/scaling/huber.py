"""Minimises Huber's loss of logarithms for a sum of powers, for many starts or many data at once."""

from __future__ import annotations

import numpy as np

STEEPEST = 4.0  # exponents are looked for between this and its opposite
SMALLEST_SHARE = 1e-3  # of the loss: a term that is nowhere larger has vanished
_STEPS, _GAIN, _STUCK = 150, 1e-7, 1e6


def predict(values: np.ndarray, design: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of losses [R, P] for R sets of parameters, and their derivatives [R, P, J]."""
    terms = _terms(values, design)
    top = terms.max(axis=1)
    shares = np.exp(terms - top[:, None])
    sums = shares.sum(axis=1)
    shares /= sums[:, None]
    return top + np.log(sums), (shares[:, :, :, None] * design).sum(axis=1)


def _terms(values: np.ndarray, design: np.ndarray) -> np.ndarray:
    """Logarithms of the terms, [R, K, P]."""
    terms, points, _ = design.shape
    return (values @ design.reshape(terms * points, -1).T).reshape(-1, terms, points)


def minimise(
    design: np.ndarray, y: np.ndarray, values: np.ndarray, delta: float
) -> tuple[np.ndarray, np.ndarray]:
    """The parameters with the least Huber's loss, for R problems at once, by damped least squares.

    Args:
      design: ``Law.design``, [K, P, J]; the first K parameters are the coefficients.
      y: logarithms of losses, [R, P].
      values: where to start, [R, J].
      delta: residuals up to this count by their squares, larger ones by their size; may be infinite.

    Returns:
      The parameters that were found, and their objectives [R].
    """
    y, values = np.array(y, float), _clipped(np.array(values, float), y, design)
    costs, damping = _objective(y - predict(values, design)[0], delta), np.full(len(values), 1e-3)
    at_work = np.arange(len(values))
    for _ in range(_STEPS):
        before = costs[at_work]
        trial = values[at_work] + _step(values[at_work], y[at_work], damping[at_work], design, delta)
        trial = _clipped(trial, y[at_work], design)
        after = _objective(y[at_work] - predict(trial, design)[0], delta)
        better = after < before
        rows = at_work[better]
        values[rows], costs[rows] = trial[better], after[better]
        damping[at_work] = np.where(better, damping[at_work] / 4, damping[at_work] * 5)
        is_done = np.where(better, before - after < _GAIN * before, damping[at_work] > _STUCK)
        at_work = at_work[~is_done]
        if not len(at_work):
            break
    return values, costs


def _step(
    values: np.ndarray, y: np.ndarray, damping: np.ndarray, design: np.ndarray, delta: float
) -> np.ndarray:
    """Where squares with Huber's weights would lead, [R, J]."""
    predicted, slopes = predict(values, design)
    left = y - predicted
    weights = np.minimum(1.0, delta / np.maximum(np.abs(left), 1e-300))
    weighted = (slopes * weights[:, :, None]).transpose(0, 2, 1)
    square = weighted @ slopes
    ridge = damping[:, None] * np.einsum("rjj->rj", square) + 1e-14
    gradient = weighted @ left[:, :, None]
    return np.linalg.solve(square + ridge[:, :, None] * np.eye(values.shape[1]), gradient)[..., 0]


def _clipped(values: np.ndarray, y: np.ndarray, design: np.ndarray) -> np.ndarray:
    """Parameters within their bounds; a term that has vanished has no gradient and is kept from going on."""
    count = len(design)
    values[:, count:] = np.clip(values[:, count:], -STEEPEST, STEEPEST)
    floor = y.mean(axis=1) + np.log(SMALLEST_SHARE) - 5
    values[:, :count] += np.maximum(floor[:, None] - _terms(values, design).max(axis=2), 0)
    return values


def _objective(left: np.ndarray, delta: float) -> np.ndarray:
    near = np.minimum(np.abs(left), delta)  # 0.5 r^2, or delta (r - 0.5 delta)
    return (near * (np.abs(left) - 0.5 * near)).sum(axis=1)
