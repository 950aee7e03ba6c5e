"""The replay bench: a search over real 135M models in milliseconds a candidate.

    python tests/benchmarks/record_outcomes.py /tmp/testbed outcomes.npz     # made it, once

`outcomes.npz` holds what several hundred recorded candidates gave on each of the testbed's 379
documents: exact match, and the likelihood of the reference. The space is that of TIES over two
specialists, a weight and a density for each of 3 layer groups, 12 variables. `Replay` answers for
any other point of the space, from Gaussian processes over the recorded ones:

    logit likelihood of a document = its mean + a combination of the first principal components
                                     over documents, each a Gaussian process over the space
                                     + what the components leave out, drawn by point and document
    exact match of a document      = Bernoulli(logistic(slope * (logit likelihood - its threshold)))

Draws depend on point and document alone: the same candidate gives the same outcomes, as a
deterministic engine does. How well the surrogate foretells candidates that it has not seen is
printed by `python tests/benchmarks/replay.py`.
"""

from __future__ import annotations

import hashlib
import warnings
from functools import cached_property
from pathlib import Path

import numpy as np
from scipy.special import expit, logit
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

OUTCOMES = Path(__file__).with_name("outcomes.npz")
N_ADDITION = 300
TASKS = ("tb_addition", "tb_roman")
N_COMPONENTS = 8
_LEAST = 1e-4


class Replay:
    """Answers for any point of the recorded space.

    Attributes:
        x: recorded points in the unit cube; shape (candidates, variables).
        exact, likelihood: recorded outcomes; shape (candidates, documents).
        task: index into TASKS of each document; shape (documents,).
    """

    def __init__(self, path: Path = OUTCOMES, rows: np.ndarray | None = None) -> None:
        with np.load(path) as recorded:
            take = slice(None) if rows is None else rows
            self.x = recorded["x"].astype(float)[take]
            self.exact = recorded["exact"].astype(float)[take]
            self.likelihood = recorded["likelihood"].astype(float)[take]
        self.task = (np.arange(self.exact.shape[1]) >= N_ADDITION).astype(int)
        z = logit(np.clip(self.likelihood, _LEAST, 1 - _LEAST))
        self._mean = z.mean(axis=0)
        _, scale, axes = np.linalg.svd(z - self._mean, full_matrices=False)
        self._axes = axes[:N_COMPONENTS] * scale[:N_COMPONENTS, None] / np.sqrt(len(z))
        scores = (z - self._mean) @ np.linalg.pinv(self._axes)
        self._processes = [_process(self.x, column) for column in scores.T]
        self._rest = (z - self._mean - scores @ self._axes).std(axis=0)
        self._slope, self._threshold = _thresholds(z, self.exact)

    def outcomes(self, point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return exact match and likelihood of every document, for a point of the unit cube."""
        point = np.asarray(point, float)
        key = hashlib.blake2b(np.round(point, 9).tobytes(), digest_size=8).digest()
        rng = np.random.default_rng(int.from_bytes(key, "big"))
        z = self._foretold(point) + self._rest * rng.standard_normal(len(self._mean))
        chance = expit(self._slope * (z - self._threshold))
        return (rng.random(len(z)) < chance).astype(float), expit(z)

    def expected(self, point: np.ndarray) -> list[float]:
        """Return each task's expected exact match over all documents: the score without any draw."""
        noise = np.random.default_rng(0).standard_normal((64, len(self._mean)))
        z = self._foretold(np.asarray(point, float)) + self._rest * noise
        chance = expit(self._slope * (z - self._threshold)).mean(axis=0)
        return [float(chance[its].mean()) for its in self.documents]

    def _foretold(self, point: np.ndarray) -> np.ndarray:
        scores = np.array([process.predict(point[None])[0] for process in self._processes])
        foretold: np.ndarray = self._mean + scores @ self._axes
        return foretold

    @cached_property
    def documents(self) -> list[np.ndarray]:
        """Document numbers by task."""
        return [np.flatnonzero(self.task == i) for i in range(len(TASKS))]


def _process(x: np.ndarray, y: np.ndarray) -> GaussianProcessRegressor:
    kernel = ConstantKernel(1.0) * RBF(np.ones(x.shape[1]), (0.2, 30)) + WhiteKernel(0.05, (1e-3, 1.0))
    process = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return process.fit(x, y)


def _thresholds(z: np.ndarray, exact: np.ndarray) -> tuple[float, np.ndarray]:
    """Fit P(exact) = logistic(slope * (z - threshold)), one slope and a threshold a document."""
    slope, threshold = 2.0, np.full(z.shape[1], 1.5)
    for _ in range(60):  # Newton steps in turn, with a weak normal prior on thresholds
        p = expit(slope * (z - threshold))
        w = p * (1 - p)
        gradient = (slope * (p - exact)).sum(axis=0) - (threshold - threshold.mean()) / 4
        threshold = threshold + gradient / ((slope**2 * w).sum(axis=0) + 0.25)
        p = expit(slope * (z - threshold))
        w = p * (1 - p)
        d = z - threshold
        slope += float(((exact - p) * d).sum() / ((w * d**2).sum() + 1e-9))
        slope = float(np.clip(slope, 0.2, 20))
    return slope, threshold


def main() -> None:
    """Print how well scores of unseen candidates are foretold: five folds."""
    with np.load(OUTCOMES) as recorded:
        x, exact, likelihood = recorded["x"], recorded["exact"], recorded["likelihood"]
    folds = np.random.default_rng(0).permutation(len(x)) % 5
    found = []
    for fold in range(5):
        replay = Replay(rows=np.flatnonzero(folds != fold))
        for i in np.flatnonzero(folds == fold):
            foretold = replay.outcomes(x[i])
            found.append(
                [
                    [values[its].mean() for values in (exact[i], foretold[0], likelihood[i], foretold[1])]
                    for its in replay.documents
                ]
            )
    table = np.array(found, float)
    for name, real in (("exact match", 0), ("likelihood", 2)):
        for t, task in enumerate(TASKS):
            a, b = table[:, t, real], table[:, t, real + 1]
            error = np.sqrt(np.mean((a - b) ** 2))
            print(f"{name:12} {task:12} r {np.corrcoef(a, b)[0, 1]:.3f}, rms error {error:.3f}")


if __name__ == "__main__":
    main()
