"""The command that repeats the papers' experiments: reproduce.

What takes long to import is imported by the command that needs it, as in `cli`.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from polygrad_fast.arguments import as_seeds
from polygrad_fast.config import PGDScale
from polygrad_fast.errors import InputError
from polygrad_fast.runs.interrupts import end_on_interrupt

Name = Literal["pgd-returns", "pgd-likelihood", "pgd-error"]
Scale = Literal["quick", "paper"]


@dataclass(frozen=True)
class Reproduce:
    """Repeat an experiment of policy-guided diffusion: collect data, train, evaluate, and write a
    table (.csv) and a figure (.png). The same command continues what was interrupted."""

    name: tyro.conf.Positional[Name]
    """Returns of agents (table 2), likelihood of guided actions (figure 5), or error of guided
    trajectories (figure 6)."""
    scale: Scale = "quick"
    """Sizes for a CPU, or the paper's."""
    seeds: str = "0-4"
    """Of models and agents, e.g. 0-4 or 0,2."""
    out: Path = Path("runs/reproduce_pgd")
    """Folder of datasets, models, agents, results, table and figure; the experiments share it."""
    progress: bool = True
    """Show progress bars."""
    sizes: Annotated[PGDScale, tyro.conf.arg(name="")] = field(default_factory=PGDScale)


def defaults(command: list[str], flag: Callable[[str], str | None]) -> dict[type, Reproduce]:
    """Return what `reproduce` starts from: the sizes of its scale.

    Raises:
        InputError: unknown scale.
    """
    scale = (flag("scale") if command == ["reproduce"] else None) or "quick"
    sizes = PGDScale.from_scale(scale)
    return {Reproduce: Reproduce(tyro.MISSING, scale, sizes=sizes)}


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
