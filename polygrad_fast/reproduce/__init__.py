"""Experiments of the papers as commands: data, training, evaluation, table and figure."""

from polygrad_fast.reproduce.pgd_returns import pgd_returns
from polygrad_fast.reproduce.pgd_trajectories import pgd_error, pgd_likelihood
from polygrad_fast.reproduce.polygrad_dynamics import fig3, fig4, fig5
from polygrad_fast.reproduce.polygrad_returns import fig6, fig8

EXPERIMENTS = {
    "fig3": fig3,
    "fig4": fig4,
    "fig5": fig5,
    "fig6": fig6,
    "fig8": fig8,
    "pgd-returns": pgd_returns,
    "pgd-likelihood": pgd_likelihood,
    "pgd-error": pgd_error,
}
"""By the name that `polygrad-fast reproduce` takes; each gets stages, sizes and seeds."""

__all__ = [
    "EXPERIMENTS",
    "fig3",
    "fig4",
    "fig5",
    "fig6",
    "fig8",
    "pgd_error",
    "pgd_likelihood",
    "pgd_returns",
]
