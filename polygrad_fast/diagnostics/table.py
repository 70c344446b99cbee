"""A gradient report for reading."""

from __future__ import annotations

from polygrad_fast.diagnostics.agreement import Agreement
from polygrad_fast.diagnostics.critic import NUM_IMAGINED, CriticError
from polygrad_fast.diagnostics.gradient import GradientReport

NOISY = 0.5
"""A ceiling below which a cosine says little."""


def table(report: GradientReport) -> str:
    """Return a report as lines of text."""
    own = f"lambda {report.gae_lambda:g}"
    if report.estimator == "pathwise":
        own += ", imagined pathwise"
    newest, every = f"newest {report.num_newest:,} starts", f"all {report.num_all:,} starts"
    rows: list[tuple[str, Agreement | float]] = [
        (f"imagined with simulated, {newest}, {own}", report.newest),
        ("the same, lambda 0, steps up to the first terminal only", report.newest_lambda_0),
        (f"imagined with simulated, {every}, {own}", report.all),
        ("the same, lambda 0, steps up to the first terminal only", report.all_lambda_0),
        ("actions: simulator's outcomes of imagined steps, with simulated", report.actions),
        ("model: imagined with simulator's outcomes of imagined steps", report.model),
        (f"starts: simulated from all with simulated from newest, {own}", report.starts),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{'policy gradient':{width}}  cosine  ceiling  length ratio"]
    for name, found in rows:
        if isinstance(found, Agreement):
            numbers = f"{found.cosine:6.2f}  {found.ceiling:7.2f}  {found.length_ratio:12.2f}"
        else:
            numbers = f"{found:6.2f}"
        lines.append(f"{name:{width}}  {numbers}")
    if report.newest.ceiling < NOISY:
        lines.append(
            f"a ceiling below {NOISY}: so many trajectories show mostly noise, more (--num) are "
            f"needed to tell; an update follows even fewer"
        )
    z, error = report.on_policy, report.error
    lines += [
        f"standardized actions: R2 {z.r2:.3f}, standard deviation {z.std:.3f}, KS {z.ks:.4f} "
        f"(noise floor {z.ks_floor:.4f}), autocorrelation {z.autocorrelation:.3f}",
        f"one imagined step: error {error.rms:.3f} (median {error.median:.3f}) in standard "
        f"deviations, reward {error.reward_rms:.3f}; {error.missed_terminals:.2%} missed and "
        f"{error.false_terminals:.2%} false terminals, {error.unsimulated:.2%} from states in "
        f"which the simulation blows up",
        f"simulator: repeats {report.share_repeated:.1%} of the run's own steps; "
        f"{report.share_determined:.1%} of the starts show their state (no clipped velocity)",
    ]
    lines.append(_critic(report.critic))
    return "\n".join(lines)


def _critic(found: CriticError) -> str:
    if found.value is None:
        return "critic: not known, for every episode reached its time limit too soon"
    line = f"critic: mean value {found.value:.2f}, return {found.discounted_return:.2f}"
    if found.correlation is not None:
        line += f", correlation {found.correlation:.2f}"
    line += f", over {found.num_states:,} states of {found.num_episodes} episodes; imagined from "
    line += f"{min(found.num_states, NUM_IMAGINED)} of them: "
    if found.imagined_return is None:
        return f"{line}the model diverges"
    return f"{line}{found.imagined_return:.2f}"
