"""Estimates made steadier by what candidates nearby in the space gave.

A candidate that was asked few documents may look good by luck; its neighbours were asked others. An
estimate is taken as y = f(x) + o + e: f, a Gaussian process over the space, what candidates nearby
share; o what the candidate has for its own; e the error of its documents, of known variance. Wanted is
f(x) + o, given every y: the posterior mean, Rasmussen and Williams 2006, Gaussian Processes for Machine
Learning, eq. 2.23, with the variances of e on the diagonal. Length and variances are those under which
the estimates are most likely.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np

from evolve.space import Value, Variable

# Smoothing takes time with the cube of the candidates; of more the best, by what the sampler saw.
MOST_SMOOTHED = 500
# What the process may be: shares of the estimates' variance, and lengths in the unit cube.
_SHARED, _OWN, _LENGTH = (0.05, 20.0), (1e-4, 1.0), (0.1, 20.0)
# Against rounding, where no documents are left to ask.
_LEAST_VARIANCE = 1e-8


def coordinates(variables: Sequence[Variable], values: Mapping[str, Value]) -> np.ndarray:
    """Return where a candidate is, in the unit cube; 0 for what its recipe does not read.

    Returns:
        Shape (numbers + all choices of categories,): a category has a coordinate a choice.
    """
    found: list[float] = []
    for variable in variables:
        value = values.get(variable.name)
        if variable.choices is not None:
            # 1 and true are two choices, and equal.
            chosen = (variable.name in values, type(value), value)
            found += [float(chosen == (True, type(choice), choice)) for choice in variable.choices]
        else:
            found.append(variable.to_unit(value) if variable.name in values else 0.0)
    return np.array(found)


def smoothed(points: np.ndarray, estimates: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Return the estimates as they are most likely, given the others.

    One without an error stays as it is.

    Args:
        points: shape (candidates, coordinates).
        estimates: of one score; shape (candidates,).
        errors: their standard errors; shape (candidates,).

    Returns:
        Shape (candidates,).
    """
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    mean, deviation = estimates.mean(), estimates.std()
    if not deviation or not errors.any():
        return estimates
    start = np.clip(0.5 * np.sqrt(points.shape[1]), *_LENGTH)
    kernel = ConstantKernel(1.0, _SHARED) * Matern(start, _LENGTH, nu=2.5) + WhiteKernel(0.05, _OWN)
    variances = (errors / deviation) ** 2 + _LEAST_VARIANCE
    process = GaussianProcessRegressor(kernel, alpha=variances)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an optimum at a bound is no fault
        process.fit(points, (estimates - mean) / deviation)
    steadier: np.ndarray = mean + deviation * (process.kernel_(points) @ process.alpha_)
    return np.where(errors > 0, steadier, estimates)
