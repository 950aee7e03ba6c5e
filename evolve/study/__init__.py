"""The record of a search: trials in Optuna's storage, outcomes and recipes in its folder."""

from evolve.study.outcomes import load_outcomes, save_outcomes
from evolve.study.standing import is_violating, total_violation
from evolve.study.study import Finalist, Study

__all__ = [
    "Finalist",
    "Study",
    "is_violating",
    "load_outcomes",
    "save_outcomes",
    "total_violation",
]
