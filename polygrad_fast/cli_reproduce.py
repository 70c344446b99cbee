"""The command that repeats the papers' experiments: reproduce.

What takes long to import is imported by the command that needs it, as in `cli`.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from polygrad_fast.arguments import as_seeds
from polygrad_fast.config import PGDScale, TrainingScale, WorldModelScale
from polygrad_fast.config.options import Options
from polygrad_fast.errors import InputError
from polygrad_fast.runs.interrupts import end_on_interrupt

SCALES: dict[type[WorldModelScale | TrainingScale | PGDScale], tuple[str, ...]] = {
    WorldModelScale: ("fig3", "fig4", "fig5"),
    TrainingScale: ("fig6", "fig8"),
    PGDScale: ("pgd-returns", "pgd-likelihood", "pgd-error"),
}
"""Sizes, and the experiments that have them."""
Name = Literal["fig3", "fig4", "fig5", "fig6", "fig8", "pgd-returns", "pgd-likelihood", "pgd-error"]
Scale = Literal["quick", "paper"]


@dataclass(frozen=True)
class Reproduce:
    """Repeat an experiment of the papers: collect data, train, evaluate, and write a table (.csv)
    and a figure (.png). The same command continues what was interrupted. Options below are those of
    fig3, fig4 and fig5; `reproduce fig6 --help` shows those of trainings, `reproduce pgd-returns
    --help` those of policy-guided diffusion."""

    name: tyro.conf.Positional[Name]
    """Of PolyGRAD: distribution of imagined actions (fig3), error and computation time of world
    models (fig4), their error at every step (fig5), learning curves beside model-free algorithms
    (fig6) and of ablations (fig8). Of policy-guided diffusion: returns of agents (table 2),
    likelihood of guided actions (figure 5), or error of guided trajectories (figure 6)."""
    scale: Scale = "quick"
    """Sizes for a CPU, or the paper's."""
    seeds: str = "0-4"
    """Of models, agents and trainings, e.g. 0-4 or 0,2."""
    out: Path = Path("runs/reproduce")
    """Folder of datasets, models, trainings, results, table and figure; the experiments of a paper
    share it."""
    progress: bool = True
    """Show progress bars."""
    sizes: Annotated[Options, tyro.conf.arg(name="")] = field(default_factory=WorldModelScale)


def defaults(arguments: list[str], flag: Callable[[str], str | None]) -> dict[type, Reproduce]:
    """Return what `reproduce` starts from: the sizes of its scale that the named experiment has.

    Raises:
        InputError: unknown scale, or a size that only other experiments have.
    """
    if arguments[:1] != ["reproduce"]:
        return {Reproduce: Reproduce(tyro.MISSING)}
    name = _experiment(arguments)
    own = next((kind for kind, names in SCALES.items() if name in names), WorldModelScale)
    sizes = {kind: {each.name for each in dataclasses.fields(kind)} for kind in SCALES}
    for size in sorted(set().union(*sizes.values()) - sizes[own]):
        option = size.replace("_", "-")
        if name is not None and flag(option) is not None:
            owners = [each for kind in SCALES if size in sizes[kind] for each in SCALES[kind]]
            raise InputError(
                f"--{option} must be left out with {name}: it is of {', '.join(owners)}"
            )
    scale = flag("scale") or "quick"
    out = Path("runs/reproduce_pgd" if own is PGDScale else "runs/reproduce")
    return {Reproduce: Reproduce(tyro.MISSING, scale, out=out, sizes=own.from_scale(scale))}


def _experiment(arguments: list[str]) -> str | None:
    """Return the experiment that the arguments name; None: none."""
    experiments = [name for names in SCALES.values() for name in names]
    for before, word in zip(arguments, arguments[1:], strict=False):
        if word in experiments and before != "--out":
            return word
    return None


def _reproduce(command: Reproduce) -> None:
    seeds = as_seeds(command.seeds, "--seeds")
    if command.out.exists() and not command.out.is_dir():
        raise InputError(f"--out must be a folder, got the file {command.out}")
    with end_on_interrupt():
        from polygrad_fast.evaluation.plots import check_plots
        from polygrad_fast.reproduce import EXPERIMENTS
        from polygrad_fast.reproduce.stages import Stages

        check_plots()
    stages = Stages(command.out, _tell, command.progress)
    rows = EXPERIMENTS[command.name](stages, command.sizes, seeds)
    table, figure = (command.out / f"{command.name}.{kind}" for kind in ("csv", "png"))
    print(f"{len(rows)} rows in {shlex.quote(str(table))}, figure in {shlex.quote(str(figure))}")


def _tell(sentence: str) -> None:
    print(sentence, flush=True)


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {"reproduce": (Reproduce, _reproduce)}
"""Options of each command, and what runs it."""
