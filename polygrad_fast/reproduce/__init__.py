"""Experiments of the papers as commands: data, training, evaluation, table and figure."""

from polygrad_fast.reproduce.pgd_returns import pgd_returns
from polygrad_fast.reproduce.pgd_trajectories import pgd_error, pgd_likelihood

EXPERIMENTS = {
    "pgd-returns": pgd_returns,
    "pgd-likelihood": pgd_likelihood,
    "pgd-error": pgd_error,
}
"""By the name that `polygrad-fast reproduce` takes; each gets stages, sizes and seeds."""

__all__ = ["EXPERIMENTS", "pgd_error", "pgd_likelihood", "pgd_returns"]
