"""Power: what a number of documents can show, and how many it takes to show a gain.

All at 95% certainty (two-sided) and 80% power: a gain of the size named is shown 8 times in 10.
"""

from __future__ import annotations

import math
from statistics import NormalDist

CERTAINTY = 0.95
POWER = 0.8
_Z_CERTAINTY = NormalDist().inv_cdf((1 + CERTAINTY) / 2)
_Z_POWER = NormalDist().inv_cdf(POWER)


def resolvable_gain(n_documents: int, discordant: float) -> float:
    """Return the smallest gain in accuracy that a paired comparison on 0/1 outcomes shows.

    The two models differ on a share p of the documents, one right and one wrong; g is the share on
    which the first is right minus that on which the second is. Solved for g from
    n = (z_certainty sqrt(p) + z_power sqrt(p - g^2))^2 / g^2 (Connor 1987,
    Biometrics 43, 207); with p in place of p - g^2 it is equation 9 of Miller 2024
    (https://arxiv.org/abs/2411.00640).

    Args:
        n_documents: documents that both models answer.
        discordant: p, in (0, 1].

    Returns:
        g in (0, p]; infinite where so few documents show no gain at all.
    """
    n, p = n_documents, discordant
    root = n - _Z_CERTAINTY**2 + _Z_POWER**2
    if root <= 0:
        return math.inf
    gain = math.sqrt(p) * (_Z_CERTAINTY * math.sqrt(n) + _Z_POWER * math.sqrt(root)) / (n + _Z_POWER**2)
    return gain if gain <= p else math.inf


def documents_needed(n_documents: int, gain: float, error: float, certainty: float = 0.0) -> int:
    """Return how many documents would show a gain, if it is as large as it was seen.

    n (z_certainty + z_power)^2 (error / gain)^2: the variance of a paired difference falls with the
    number of documents (Miller 2024, section 5, https://arxiv.org/abs/2411.00640).

    Args:
        n_documents: on how many it was seen, over all tasks; the answer has the same mix.
        gain: as seen, > 0.
        error: its standard error.
        certainty: standard errors that the interval's lower end lies below the gain, where an
            adjustment makes them more than 1.96.
    """
    errors = max(certainty, _Z_CERTAINTY) + _Z_POWER
    return math.ceil(n_documents * (errors * error / gain) ** 2)
