"""Are trajectories true whose first state is imagined too? Their actions replayed from there."""

from __future__ import annotations

import numpy as np

from polygrad_fast.diagnostics.simulator import Simulator


def trajectory_errors(
    simulator: Simulator,
    observations: np.ndarray,
    actions: np.ndarray,
    terminals: np.ndarray,
    scale: np.ndarray,
) -> np.ndarray:
    """Return the squared error of each observation after the first against the simulator's, mean
    over its entries (figure 6 of arXiv 2404.06356).

    The simulator is put into the state that the first observation shows and plays the trajectory's
    own actions. What follows an end, in either, does not count, nor what follows a simulation that
    blew up, nor a trajectory whose first observation does not determine the state.

    Args:
        simulator: of the environment.
        observations: raw, [N, T, S].
        actions: in the environment's units and bounds, [N, T, A]; the last is not played.
        terminals: 0 or 1, [N, T].
        scale: unit of each entry of observations, [S].

    Returns:
        float64 [N, T - 1]; NaN where nothing counts.
    """
    number, length = terminals.shape
    errors = np.full((number, length - 1), np.nan)
    for i in np.flatnonzero(simulator.is_determined(observations[:, 0])):
        simulator.set(observations[i, 0])
        for t in range(length - 1):
            real, _, ended = simulator.step(actions[i, t])
            if ended or terminals[i, t] > 0 or not np.isfinite(real).all():
                break
            difference = (observations[i, t + 1].astype(np.float64) - real) / scale
            errors[i, t] = np.square(difference).mean()
    return errors
