"""Tables made of stored rows: a listing for terminals, and those of Markdown files."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from harness.chance_tables import chance_caption, chance_table
from harness.figure_tables import (
    actions_caption,
    actions_table,
    models_caption,
    models_table,
    trainings_caption,
    trainings_table,
)
from harness.pgd_tables import (
    returns_caption,
    returns_table,
    trajectories_caption,
    trajectories_table,
)
from harness.rows import Row
from polygrad_fast.config import TrainConfig
from polygrad_fast.errors import InputError
from polygrad_fast.reproduce.statistics import estimate
from polygrad_fast.runs.files import write_bytes_atomic

NOT_MEASURED = "not measured"
END = "<!-- end of table -->"
POLICIES = ("untrained", "best", "last")
TUNED_ON = {
    "laptop": ("HalfCheetah-v5", "Hopper-v5"),
    "quick": ("InvertedPendulum-v5", "Pendulum-v1"),
}
"""Environments on which a preset's settings were chosen by what it learnt."""
TARGETS = {"float32": (1.15, 1.0), "bfloat16": (1.25, 2.3)}
"""Of engine "torch" on one CPU thread: its time over its GEMMs' at most, and the reference's over
its own at least."""


def listing(rows: Iterable[Row]) -> str:
    """Return rows as text, one line each; a sample's time also against the reference engine's."""
    rows = list(rows)
    reference = {
        _without_engine(row): row.ms
        for row in rows
        if row.case.get("engine") == "reference" and row.ms
    }
    lines = [("case", "ms", "us/item", "TFLOP/s", "GB/s", "floor", "x ref", "GB", "status")]
    for row in rows:
        base = reference.get(_without_engine(row))
        failed = "; ".join(
            f"{c.name}: {'NaN' if c.value is None else f'{c.value:.1e}'} > {c.allowed:.1e}"
            for c in row.checks
            if not c.passed
        )
        lines.append(
            (
                row.name,
                _number(row.ms, ".4g"),
                _number(row.us_per_item, ".4g"),
                _number(row.tflops, ".3g"),
                _number(row.gb_per_s, ".3g"),
                _number(row.share_of_floor, ".0%"),
                _number(base / row.ms if base and row.ms else None, ".2f"),
                _number(row.values.get("peak_memory_gb"), ".2f"),
                f"{row.status}, {failed}" if failed else row.status,
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numbers = range(1, 8)
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _without_engine(row: Row) -> tuple:
    case = {k: v for k, v in row.case.items() if k != "engine"}
    return row.benchmark, row.machine, tuple(sorted(case.items()))


def _number(value: float | None, format: str) -> str:
    return "-" if value is None else f"{value:{format}}"


def render(text: str, rows: Iterable[Row]) -> str:
    """Return a text with everything between its table markers made anew from rows.

    A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`, NAME one of `TABLES`.

    Raises:
        InputError: there is no marker, or a table has no such name, no end or no rows.
    """
    rows = list(rows)

    def table(match: re.Match) -> str:
        name = match[1]
        if name not in TABLES:
            raise InputError(f"the table {name!r} is not one of {list(TABLES)}")
        return f"<!-- table: {name} -->\n{build(name, rows)}\n{END}"

    begin = r"<!-- table: (\w+) -->"
    whole = rf"{begin}\n(?:(?!<!-- ).*\n)*{re.escape(END)}"
    tables, begins = len(re.findall(whole, text)), len(re.findall(begin, text))
    if tables == 0 or tables != begins:
        raise InputError(
            f"{begins} tables begin with '<!-- table: NAME -->' and {tables} of them end with "
            f"'{END}', wanted at least one, and an end for each"
        )
    return re.sub(whole, table, text)


def stale_tables(text: str, rows: Iterable[Row]) -> list[str]:
    """Return the names of the tables in a text that differ from the rows'."""
    wanted = render(text, rows)
    pattern = rf"<!-- table: (\w+) -->\n(.*?){re.escape(END)}"
    pairs = zip(
        re.findall(pattern, text, re.DOTALL), re.findall(pattern, wanted, re.DOTALL), strict=True
    )
    return [name for (name, got), (_, new) in pairs if got != new]


def all_tables(rows: Iterable[Row]) -> str:
    """Return every table, one after the other."""
    rows = list(rows)
    return "\n\n".join(f"## {name}\n\n{build(name, rows)}" for name in TABLES)


def build(name: str, rows: Iterable[Row]) -> str:
    """Return one table.

    Raises:
        InputError: a row lacks what the table shows, or has something else in its place.
    """
    try:
        return TABLES[name]([row for row in rows if not row.smoke])
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(
            f"the table {name!r} cannot be made of these rows: {type(error).__name__} {error}"
        ) from error


def _grid(header: list[str], lines: Iterable[list[str]]) -> str:
    """Return a Markdown table."""
    rule = ["---"] * len(header)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))


def _of(rows: list[Row], *benchmarks: str) -> list[Row]:
    """Return the rows of these benchmarks."""
    found = [row for row in rows if row.benchmark in benchmarks]
    return sorted(found, key=lambda row: benchmarks.index(row.benchmark))


def _unique(values: Iterable) -> list:
    return list(dict.fromkeys(values))


def _provenance(rows: list[Row]) -> str:
    """Return what was run where, one line per machine, versions and command."""
    shown = {name: table.benchmarks for name, table in TABLES.items() if isinstance(table, Table)}
    lines = {}
    for name, benchmarks in shown.items():
        for row in _of(rows, *benchmarks):
            facts = [row.machine]
            if row.driver:
                facts.append(f"driver {row.driver}")
            for package in ("torch", "triton", "gymnasium", "mujoco"):
                version = getattr(row, package)
                if version and (package != "triton" or row.device == "cuda"):
                    facts.append(f"{package} {version}")
            if row.tests == "failed":
                facts.append("after tests that failed")
            command = f"`{row.command}`" if row.command else "command unknown"
            lines.setdefault((command, ", ".join(facts)), []).append((name, row))
    texts = []
    for (command, facts), found in lines.items():
        names = ", ".join(_unique(name for name, _ in found))
        commits = _unique(
            f"{(r.commit or 'unknown')[:7]}{' (changed)' if r.dirty else ''}" for _, r in found
        )
        dates = _unique(row.date[:10] for _, row in found if row.date)
        texts.append(
            f"- {names}: {command}\n"
            f"  on {facts}; {', '.join([f'commit {commit}' for commit in commits] + dates)}."
        )
    return "\n".join(texts) or f"{NOT_MEASURED}."


def _time(row: Row | None) -> str:
    """Return a row's time, marked where it is of one call, and its share of the floor."""
    if row is None:
        return NOT_MEASURED
    if row.ms is None:
        return _failure(row)
    unit, value = ("ms", row.ms) if row.ms >= 1 else ("us", 1e3 * row.ms)
    share = "" if row.share_of_floor is None else f" ({row.share_of_floor:.0%})"
    number = f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"
    return f"{number} {unit}{_mark(row)}{share}"


def _failure(row: Row) -> str:
    """Return how a row without a time ended."""
    if row.status == "ok":
        raise ValueError(f"{row.name} is ok, but has no ms")
    return row.status


def _mark(row: Row) -> str:
    return "*" if row.calls == 1 else ""


def _quick_seeds(rows: list[Row]) -> str:
    """Return what a preset learns, one line per environment."""
    lines = []
    for (env_id, preset, world_model), found in _by_environment(rows):
        own = [row for row in found if row.status == "ok"]
        failed = len(found) - len(own)

        def over_seeds(name: str, own=own) -> str:
            values = [row.values[name] for row in own]
            if not values:
                return "-"
            mean, low, high = sum(values) / len(values), min(values), max(values)
            return f"{_return(mean)} ({_return(low)} to {_return(high)})"

        def mean(name: str, own=own) -> float:
            return sum(row.values[name] for row in own) / len(own)

        lines.append(
            [
                env_id,
                preset,
                _in_words(world_model),
                "-" if world_model.startswith("none, ") else _tuned(preset, env_id),
                f"{len(own)}, {failed} failed" if failed else str(len(own)),
                *(over_seeds(f"{policy}_mean_reward") for policy in POLICIES),
                f"{mean('train_steps'):,.0f} + {mean('selection_steps'):,.0f}" if own else "-",
                f"{mean('train_seconds') / 60:.1f}" if own else "-",
            ]
        )
    header = ["environment", "preset", "world model", "tuned on it", "seeds", "untrained"]
    header += ["best checkpoint", "last checkpoint", "steps trained + for selection", "minutes"]
    return _grid(header, lines)


def _quick_seeds_caption(rows: list[Row]) -> str:
    episodes = ", ".join(_episodes(rows))
    return (
        f"Returns: mean over seeds (lowest to highest), of {episodes} fresh episodes each that no\n"
        "training and no selection saw, the same for a seed's three policies; selection: steps of\n"
        "the evaluations that chose the best. Minutes: with other work on the machine."
    )


def _quick_seeds_each(rows: list[Row]) -> str:
    """Return what a preset learns on each seed."""
    lines = []
    for (env_id, preset, world_model), own in _by_environment(rows):
        for row in sorted(own, key=lambda row: row.case["seed"]):
            v, seed = row.values, str(row.case["seed"])
            names = [env_id, preset, _in_words(world_model), seed]
            if row.status != "ok":
                lines.append([*names, _failure(row), *7 * "-"])
                continue
            lines.append(
                [
                    *names,
                    *(
                        f"{_return(v[f'{policy}_mean_reward'])} ± "
                        f"{_return(v[f'{policy}_std_reward'])}"
                        for policy in POLICIES
                    ),
                    f"{v['best_step']:,.0f}",
                    f"{v['train_steps']:,.0f}",
                    f"{v['selection_steps']:,.0f} in {v['selection_evaluations']:.0f} evaluations",
                    f"{v['train_seconds'] / 60:.1f}",
                    f"{v['evaluation_seed']:.0f}",
                ]
            )
    header = ["environment", "preset", "world model", "seed", "untrained", "best checkpoint"]
    header += ["last checkpoint", "best at step", "steps trained", "steps for selection", "minutes"]
    return _grid([*header, "evaluation seed"], lines)


def _quick_seeds_each_caption(rows: list[Row]) -> str:
    episodes = ", ".join(_episodes(rows))
    return f"Returns: mean ± standard deviation over {episodes} episodes of the evaluation seed."


def _episodes(rows: list[Row]) -> list[str]:
    """Return the numbers of fresh episodes."""
    return _unique(f"{row.values['episodes']:.0f}" for row in rows if row.status == "ok")


def _by_environment(rows: list[Row]) -> list[tuple[tuple[str, str, str], list[Row]]]:
    """Return the rows of each environment, preset and world model, those tuned on first."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        key = row.case["env_id"], row.case["preset"], row.case["world_model"]
        groups.setdefault(key, []).append(row)
    places = {env_id: i for i, (env_id, *_) in enumerate(groups)}

    def order(item: tuple) -> tuple[bool, int]:
        env_id, preset, _ = item[0]
        return _tuned(preset, env_id) != "yes", places[env_id]

    return sorted(groups.items(), key=order)


def _in_words(name: str) -> str:
    return name.replace("_", " ")


def _tuned(preset: str, env_id: str) -> str:
    return "yes" if env_id in TUNED_ON.get(preset, ()) else "no"


def _return(value: float) -> str:
    """Return a return in words; a small one with a decimal."""
    return f"{value:.0f}" if abs(value) >= 9.95 or value == 0 else f"{value:.1f}"


def _world_models(rows: list[Row]) -> str:
    """Return how true each world model's policy gradient is, one part per run."""
    parts = []
    for place in _unique((row.case["env_id"], row.case["env_steps"]) for row in rows):
        lines, critic = [], ""
        for row in rows:
            v, case = row.values, row.case
            if (case["env_id"], case["env_steps"]) != place:
                continue
            if "critic/value" in v:
                critic = (
                    f"; its critic's values {v['critic/value']:.1f}, returns "
                    f"{v['critic/discounted_return']:.1f}"
                )
                if "critic/correlation" in v:
                    critic += f", correlation {v['critic/correlation']:.2f}"
            lines.append(
                [
                    case["world_model"],
                    str(case["steps"]) if case["steps"] else "-",
                    f"{v['updates']:,.0f}",
                    *(
                        f"{v[f'{name}/cosine']:.2f} ({v[f'{name}/ceiling']:.2f})"
                        for name in ("newest", "newest_lambda_0", "all")
                    ),
                    f"{v['on_policy/r2']:.3f}",
                    f"{v['on_policy/std']:.2f}",
                    f"{v['on_policy/ks']:.3f} ({v['on_policy/ks_floor']:.3f})",
                    f"{v['error/rms']:.3f}",
                    f"{v['error/missed_terminals']:.2%}",
                    _known(v.get("critic/imagined_return")),
                    f"{v['seconds_per_1000']:.2f}",
                ]
            )
        header = ["world model", "steps", "updates", "newest starts", "newest, lambda 0"]
        header += ["all starts", "R2 of z", "std of z", "KS (floor)", "one-step error"]
        header += ["missed terminals", "imagined return", "s per 1,000"]
        env_id, env_steps = place
        parts.append(f"{env_id}, run at {env_steps:,} steps{critic}:\n\n{_grid(header, lines)}")
    return "\n\n".join(parts)


def _known(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _world_models_caption(rows: list[Row]) -> str:
    seconds = ", ".join(_unique(f"{row.values['train_seconds']:g}" for row in rows))
    return (
        f"Each trained {seconds} processor seconds on the run's replay. Cosines: imagined against "
        "simulated\npolicy gradient from the same starts, at the run's lambda unless said; in "
        "brackets what they would be\nif both estimated the same, given their noise. z: "
        "standardized imagined actions. Error: root mean\nsquare of the next observation, "
        "normalized. s: processor seconds per 1,000 trajectories, 256 at a time. Critic: on which\n"
        "all gradients of a run rest; means over states of its policy's own episodes. Imagined "
        "return: the model's, from\nsome of these (-: it diverges, or the row is older than that)."
    )


def _on_policy(rows: list[Row]) -> str:
    """Return how far imagined actions are from the policy's, one line per environment and action
    update, means over seeds."""
    sigmas = _unique(row.case["sigma"] for row in rows)
    lines = []
    for env_id, update in _unique((row.case["env_id"], row.case["update"]) for row in rows):
        own = [row for row in rows if (row.case["env_id"], row.case["update"]) == (env_id, update)]
        cells = []
        for sigma in sigmas:
            values = [row.values for row in own if row.case["sigma"] == sigma]
            if not values:
                cells.append(NOT_MEASURED)
                continue

            def mean(name: str, values=values) -> float:
                return sum(v[name] for v in values) / len(values)

            ratio = sum(v["ks"] / v["ks_floor"] for v in values) / len(values)
            cells.append(f"{mean('std'):.2f}, {ratio:.1f}, {mean('r2'):.3f}")
        seeds = len(_unique(row.case["seed"] for row in own))
        lines.append([env_id, update, str(seeds), *cells])
    header = ["environment", "action update", "seeds", *(f"sigma {s:g}" for s in sigmas)]
    return _grid(header, lines)


def _on_policy_caption(rows: list[Row]) -> str:
    return (
        "Standardized imagined actions z = (a - mu) / sigma: their standard deviation (1\n"
        "on-policy), Kolmogorov-Smirnov distance to N(0, 1) over that of as many true normals\n"
        "(1), and R2 of z on its own state (0, slightly negative where there is nothing).\n"
        "Residual MLP 256 x 3, 16 steps; the guidance scale is tuned on 40 samples at each sigma,\n"
        "one after the other, as equation 10 does it."
    )


def _attribution(rows: list[Row]) -> str:
    """Return where whole updates' time goes, one line per way to take them."""
    parts = ("model_update_ms", "imagine_ms", "policy_update_ms", "replay_ms", "rest_ms")
    lines = []
    for row in rows:
        case, v = row.case, row.values
        name = f"{case['preset']}, {_in_words(case['world_model'])}, {case['env_id']}"
        hours = f"{v['hours_per_million_steps']:.1f} h"
        times = f"{v['whole_ms']:.1f} ({v['times_as_fast']:.2f}x)"
        lines.append([name, case["variant"], times, *(f"{v[p]:.1f}" for p in parts), hours])
    header = ["preset, world model", "", "whole, ms", "model", "imagining", "policy", "windows"]
    return _grid([*header, "acting, environment", "1 M steps"], lines)


def _attribution_caption(rows: list[Row]) -> str:
    return (
        "Processor milliseconds of one whole update: as many environment steps as fall on one\n"
        "policy update, the world model's updates due after them, one batch imagined (128\n"
        "trajectories in preset quick, 64 in default, 128 in laptop), one A2C update. In\n"
        "brackets: times as fast as the first line of its preset and world model. Plain PyTorch:\n"
        "engine reference, autograd for model and value function. Each line adds to the one above\n"
        "it. All lines of a preset were measured in turns, on one machine under the same load."
    )


def _learning_curves(rows: list[Row]) -> str:
    """Return the returns of two commits' policies while they learn, one line per evaluation."""
    curves: dict[tuple[str, str], dict[str, dict[float, list[float]]]] = {}
    for row in rows:
        codes = curves.setdefault((row.case["env_id"], row.case["preset"]), {})
        at_step = codes.setdefault(row.case["code"], {})
        for step, value in zip(row.curves["env_step"], row.curves["mean_reward"], strict=True):
            at_step.setdefault(step, []).append(value)
    tables = []
    for (env_id, preset), codes in curves.items():
        lines = []
        for step in sorted(set.intersection(*map(set, codes.values()))):
            found = [estimate([at_step[step]]) for at_step in codes.values()]
            overlap = max(each.low for each in found) <= min(each.high for each in found)
            lines.append(
                [
                    f"{step:,.0f}",
                    *(f"{_return(e.iqm)} ({_return(e.low)} to {_return(e.high)})" for e in found),
                    "yes" if overlap else "no",
                ]
            )
        seeds = {code: max(map(len, at_step.values())) for code, at_step in codes.items()}
        header = [f"{env_id}, {preset}: environment steps"]
        header += [f"{code}, {count} seeds" for code, count in seeds.items()]
        tables.append(_grid([*header, "overlap"], lines))
    return "\n\n".join(tables)


def _learning_curves_caption(rows: list[Row]) -> str:
    seconds: dict[str, list[float]] = {}
    for row in rows:
        seconds.setdefault(row.case["code"], []).append(row.values["processor_seconds"])
    means = ", ".join(f"{code} {sum(s) / len(s):.0f}" for code, s in seconds.items())
    return (
        "Returns of the evaluations during training: interquartile mean over seeds and its\n"
        "bootstrap interval of 95 %; both commits with the settings of the older one's preset.\n"
        f"Processor seconds of a run, evaluations included: {means}."
    )


def _sampler_steps(rows: list[Row]) -> str:
    """Return one diffusion step of engine "torch" beside its own GEMMs."""
    lines, missed = [], []
    for row in rows:
        batch, steps = row.case["batch"], row.case["steps"]
        if row.ms is None:
            lines.append([row.dtype, str(batch), str(steps), _failure(row), *4 * "-"])
            continue
        gemms, packed, reference = (
            row.values[f"{name}_ms"] for name in ("gemms", "packed", "reference")
        )
        share = "" if row.share_of_floor is None else f" ({row.share_of_floor:.0%})"
        lines.append(
            [
                row.dtype,
                str(batch),
                str(steps),
                f"{row.ms:.2f}{_mark(row)}{share}",
                f"{reference:.2f}",
                f"{reference / row.ms:.2f}x",
                f"{gemms:.2f} ({row.ms / gemms:.2f}x)",
                f"{packed:.2f} ({row.ms / packed:.2f}x)",
            ]
        )
        most, least = TARGETS[row.dtype]
        if row.ms / gemms > most:
            missed.append(f"{row.dtype} B = {batch} ({row.ms / gemms:.3f} times its GEMMs)")
        if reference / row.ms < least:
            missed.append(f"{row.dtype} B = {batch} ({reference / row.ms:.3f} times as fast)")
    header = ["engine torch", "B", "K", "ms per step (of floor)", "reference", "faster"]
    targets = f"missed at {', '.join(missed)}" if missed else "met in all of them"
    return f"{_grid([*header, 'its GEMMs', 'packed'], lines)}\n\nTargets here: {targets}."


def _sampler_steps_caption(rows: list[Row]) -> str:
    most, least = (
        " and ".join(f"{values[i]:g} ({dtype})" for dtype, values in TARGETS.items())
        for i in range(2)
    )
    return (
        "One of K diffusion steps, paper-sized residual MLP, S = 17, A = 6, H = 10; medians of\n"
        "interleaved rounds. Its GEMMs alone take the milliseconds given, and in brackets is the\n"
        "engine's time over theirs: with weights in PyTorch's layout, and packed in oneDNN's, as\n"
        f"the engine does. Targets: at most {most} times the\nformer, and a reference that takes "
        f"at least {least} times as long."
    )


def _edm_samples(rows: list[Row]) -> str:
    """Return whole samples by the packed U-Net beside the plain loop."""
    lines = []
    for row in rows:
        names = ("features", "length", "batch", "steps")
        sizes = [row.dtype, *(str(row.case[name]) for name in names)]
        if row.ms is None:
            lines.append([*sizes, _failure(row), *4 * "-"])
            continue
        reference, convolutions, products = (
            row.values[f"{name}_ms"] for name in ("reference", "convolutions", "products")
        )
        lines.append(
            [
                *sizes,
                f"{row.ms / 1e3:.2f} s{_mark(row)}",
                f"{reference / 1e3:.2f} s",
                f"{reference / row.ms:.2f}x",
                f"{convolutions / 1e3:.2f} s",
                f"{products / 1e3:.2f} s ({row.ms / products:.2f}x)",
            ]
        )
    header = ["engine torch", "features", "L", "B", "N", "a sample", "plain loop", "faster"]
    return _grid([*header, "the loop's convolutions", "its own products"], lines)


def _edm_samples_caption(rows: list[Row]) -> str:
    return (
        "B trajectories of L rows by N Heun steps (2 N - 1 evaluations) of the U-Net of\n"
        "policy-guided diffusion with 3 levels, S = 11, A = 3, unguided; medians of interleaved\n"
        "rounds. The plain loop is engine reference in float32. Its convolutions alone take the\n"
        "time given, and so do engine torch's products, on operands that are in the caches;\n"
        "in brackets engine torch's time over its products'."
    )


def _claims(rows: list[Row]) -> str:
    """Return what holds of engine "torch" on every machine measured, and each machine's range."""
    rows = [row for row in _of(rows, "sampler step") if row.device == "cpu"]
    machines = _unique(row.machine for row in rows)
    lines, seen = [], []
    for dtype in _unique(row.dtype for row in rows):
        found = {
            machine: {
                row.case["batch"]: row
                for row in rows
                if (row.machine, row.dtype) == (machine, dtype) and row.ms is not None
            }
            for machine in machines
        }
        batches = sorted(set.intersection(*(set(by_batch) for by_batch in found.values())))
        if not batches:
            lines.append([dtype, *(NOT_MEASURED for _ in ("", *machines))])
            continue
        cells, lowest = [], math.inf
        for by_batch in found.values():
            shown = [by_batch[batch] for batch in batches]
            faster = [row.values["reference_ms"] / row.ms for row in shown]
            floors = [row.share_of_floor for row in shown]
            lowest = min(lowest, *faster)
            share = "" if None in floors else f", {_range(floors, _percent)} of floor"
            cells.append(f"{_range(faster, _down)}x{share}")
        lines.append([dtype, f"at least {_down(lowest)}x", *cells])
        seen += batches
    if not seen:
        return f"On a CPU: {NOT_MEASURED}."
    header = ["engine torch", "on all of these" if len(machines) > 1 else "on this machine"]
    sizes = ", ".join(map(str, sorted(set(seen))))
    return (
        f"{_grid(header + machines, lines)}\n\n"
        "Times as fast as the released code's computation (engine reference), one diffusion step\n"
        f"of the paper-sized residual MLP, B = {sizes}, S = 17, A = 6, H = 10; and the share of\n"
        "the floor, its FLOPs at the rate of a large matrix product on the same machine. Rounded\n"
        "down. On machines that are not here it may be less."
    )


def _range(values: list[float], written: Callable[[float], str]) -> str:
    """Return the lowest and the highest value, once where they are written alike."""
    return " to ".join(_unique((written(min(values)), written(max(values)))))


def _percent(value: float) -> str:
    return f"{math.floor(100 * value)}%"


def _down(value: float) -> str:
    """Return a factor with one decimal, rounded down: what is claimed holds."""
    return f"{math.floor(10 * value + 1e-9) / 10:.1f}"


def _speed(rows: list[Row]) -> str:
    """Return what a user waits for on each machine: a sample, and a million environment steps of
    each preset."""
    samples = [
        row
        for row in _of(rows, "sample")
        if row.case["denoiser"] == "residual_mlp" and row.case["horizon"] == 10
    ]
    updates = _of(rows, "whole update")
    lines: dict[str, dict[str, str]] = {}
    machines = _unique(row.machine for row in samples + updates)
    for machine in machines:
        for row in _fastest([row for row in samples if row.machine == machine]):
            what = f"imagining {row.case['batch']:,} trajectories, {row.dtype}"
            cell = _beside_reference(row, samples, row.ms / 1e3, "s")
            lines.setdefault(what, {})[machine] = cell
        for row in _fastest([row for row in updates if row.machine == machine]):
            case, config = row.case, TrainConfig.from_preset(row.case["preset"])
            hours = row.ms / 3.6e6 / row.values["env_steps"]  # per environment step
            own_size = case["batch"] == config.imagined_batch_size
            size = "" if own_size else f" with {case['batch']:,} imagined trajectories an update"
            what = f"1 M environment steps, preset {case['preset']}{size}, {row.dtype}"
            cell = _beside_reference(row, updates, 1e6 * hours, "h")
            lines.setdefault(what, {})[machine] = cell
            if own_size and config.total_timesteps < 1_000_000:
                what = f"its own {config.total_timesteps:,} steps"
                lines.setdefault(what, {})[machine] = _duration(config.total_timesteps * hours)
    grid = _grid(
        ["", *machines],
        [[what, *(cells.get(m, NOT_MEASURED) for m in machines)] for what, cells in lines.items()],
    )
    text = f"{grid}\n\n{_speed_caption(updates)}" if lines else f"On a CPU: {NOT_MEASURED}."
    on_gpu = any(row.device == "cuda" for row in samples + updates)
    return text if on_gpu else f"{text} On a GPU: {NOT_MEASURED}."


def _duration(hours: float) -> str:
    """Return a time in the unit that a person would take."""
    if hours < 1:
        return f"{60 * hours:.1f} minutes"
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:,.0f} days"


def _speed_caption(updates: list[Row]) -> str:
    environments = " and ".join(_unique(row.case["env_id"] for row in updates))
    return (
        "In brackets: times as fast as the released code's computation (engine reference, plain\n"
        "PyTorch in float32), rounded down; `*`: one call. Imagining: paper-sized residual MLP,\n"
        f"H = 10, K = 128. Steps: from one measured update ({environments})."
    )


def _fastest(rows: list[Row]) -> list[Row]:
    """Return of each dtype the fastest engine's row, at the size that a user meets: of samples the
    largest batch up to 1024, of whole updates the largest up to the preset's own."""

    def place(row: Row) -> tuple:
        return row.case.get("preset", ""), row.dtype

    def rank(row: Row) -> tuple:
        batch, most = row.case["batch"], 1024
        if row.benchmark == "whole update":
            config = TrainConfig.from_preset(row.case["preset"])
            most = config.imagined_batch_size
        return batch <= most, batch if batch <= most else -batch, -row.ms

    best: dict[tuple, Row] = {}
    for row in rows:
        if row.ms is None or row.case["engine"] in ("reference", "compile"):
            continue
        if place(row) not in best or rank(row) > rank(best[place(row)]):
            best[place(row)] = row
    order = _unique(key[0] for key in best)
    dtypes = ("float32", "tf32", "bfloat16", "float16")
    return [best[k] for k in sorted(best, key=lambda k: (order.index(k[0]), dtypes.index(k[1])))]


def _beside_reference(row: Row, rows: list[Row], value: float, unit: str) -> str:
    """Return a cell: a row's value, and how many times as fast as the reference engine's it is."""
    number = f"{value:.2g}" if value < 9.95 else f"{value:,.0f}"
    for other in rows:
        same = (other.machine, other.case) == (row.machine, row.case | {"engine": "reference"})
        if same and other.ms is not None:
            marked = _mark(row) or _mark(other)
            return f"{number} {unit} ({_down(other.ms / row.ms)}x){marked}"
    return f"{number} {unit}{_mark(row)}"


def _samples(rows: list[Row]) -> str:
    """Return whole samples, one line per shape; of each engine float32 and, of its other dtypes,
    the one that is the fastest at most shapes."""

    def shape(row: Row) -> tuple:
        return tuple(row.case[name] for name in ("denoiser", "horizon", "batch"))

    times: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if row.ms is not None and row.dtype != "float32":
            times.setdefault((row.case["engine"], shape(row)), {})[row.dtype] = row.ms
    wins = collections.Counter(
        (engine, min(by_dtype, key=by_dtype.get)) for (engine, _), by_dtype in times.items()
    )
    fastest = {engine: dtype for (engine, dtype), _ in reversed(wins.most_common())}
    engines = ((row.case["engine"], row.dtype) for row in rows)
    columns = sorted(
        {(e, dtype) for e, dtype in engines if dtype in ("float32", fastest.get(e, dtype))}
    )
    by_place = {(shape(row), row.case["engine"], row.dtype): row for row in rows}
    lines = [
        [place[0].replace("_", " "), *map(str, place[1:])]
        + [_time(by_place.get((place, *column))) for column in columns]
        for place in sorted(_unique(map(shape, rows)))
    ]
    header = ["denoiser", "H", "B", *(f"{engine} {dtype}" for engine, dtype in columns)]
    widths: dict[str, dict[str, list[int]]] = {}
    for row in rows:
        if "hidden_dim" in row.values:
            by_width = widths.setdefault(row.case["denoiser"].replace("_", " "), {})
            by_width.setdefault(f"{row.values['hidden_dim']:.0f}", []).append(row.case["horizon"])
    texts = (
        f"{kind} "
        + ", ".join(
            f"{width} (H = {', '.join(map(str, sorted(set(horizons))))})"
            for width, horizons in by_width.items()
        )
        for kind, by_width in widths.items()
    )
    grid = _grid(header, lines)
    return f"{grid}\n\nHidden widths: {'; '.join(texts)}." if widths else grid


def _case(row: Row) -> str:
    """Return a row's case in words, with what a whole update consists of."""
    parts = [f"{k.replace('env_id', 'on')} {v}" for k, v in row.case.items()]
    if {"env_steps", "denoiser_updates"} <= set(row.values):
        parts.append(f"environment steps {row.values['env_steps']:.0f}")
        parts.append(f"denoiser updates {row.values['denoiser_updates']:.0f}")
    return ", ".join(parts).replace("_", " ")


def _updates(rows: list[Row]) -> str:
    """Return one line per case."""
    lines = [[row.benchmark, _case(row), row.dtype, _time(row)] for row in rows]
    return _grid(["what", "case", "dtype", "time (of floor)"], lines)


def _kernels(rows: list[Row]) -> str:
    """Return one line per case; on a GPU only those of the paper's batch, width and horizon."""
    paper = {"rows": 1024, "batch": 1024, "width": 1024, "horizon": 10}
    lines = [
        [row.benchmark, _case(row), row.dtype, _time(row)]
        + [_number(row.tflops, ".3g"), _number(row.gb_per_s, ".3g")]
        for row in rows
        if row.device == "cpu" or all(row.case.get(k, v) == v for k, v in paper.items())
    ]
    return _grid(["what", "case", "dtype", "time (of floor)", "TFLOP/s", "GB/s"], lines)


def _environments(rows: list[Row]) -> str:
    """Return steps per second in environments and in the simulator."""
    horizons = sorted({r.case["horizon"] for r in rows if r.benchmark == "dynamics replay"})
    lines = []

    def per_second(row: Row, ms: float | None) -> str:
        return _failure(row) if ms is None else f"{1e3 / ms:,.0f}{_mark(row)}"

    for name in _unique(row.case["env_id"] for row in rows):
        cells = dict.fromkeys(["step", "bare", *horizons], NOT_MEASURED)
        for row in (row for row in rows if row.case["env_id"] == name):
            if row.benchmark == "environment step":
                cells["step"] = per_second(row, row.ms)
                cells["bare"] = per_second(row, row.ms and row.values["bare_ms"])
            else:
                cells[row.case["horizon"]] = per_second(row, row.ms)
        lines.append([name, *cells.values()])
    header = ["environment", "agent's wrapper, steps/s", "bare gymnasium"]
    return _grid(header + [f"simulator's replay, H = {horizon}" for horizon in horizons], lines)


def _offline_updates(rows: list[Row]) -> str:
    """Return updates of the offline agents beside a plain version and their products."""
    lines = []
    for row in rows:
        if row.ms is None:
            cells = [_failure(row), *[NOT_MEASURED] * 3]
        else:
            plain, products = (row.values[f"{name}_ms"] for name in ("plain", "products"))
            cells = [f"{_time(row)}, {1e3 / row.ms:,.0f} per s", f"{plain:.3g} ms"]
            cells += [f"{products:.3g} ms", f"{1e6 * row.ms / 3.6e6:.1f} h"]
        lines.append([row.case["agent"], str(row.case["batch"]), *cells])
    header = ["agent", "batch", "update (of floor)", "plain PyTorch", "its matrix products"]
    return _grid([*header, "1 M updates"], lines)


@dataclass(frozen=True)
class Table:
    """A table with a part for every machine that measured it.

    Attributes:
        grid: makes a part of the rows of one machine.
        benchmarks: whose rows it shows.
        devices: "cpu", "cuda" or both; those without rows are said to be not measured.
        caption: makes, of all rows shown, what stands below the parts.
    """

    grid: Callable[[list[Row]], str]
    benchmarks: tuple[str, ...]
    devices: tuple[str, ...] = ("cpu",)
    caption: Callable[[list[Row]], str] | None = None

    def __call__(self, rows: list[Row]) -> str:
        """Return the table of all rows that belong to it."""
        found = _of(rows, *self.benchmarks)
        shown = [row for row in found if row.device in self.devices]
        parts = []
        for device in self.devices:
            own = [row for row in shown if row.device == device]
            for machine in _unique(row.machine for row in own):
                text = self.grid([row for row in own if row.machine == machine])
                note = "; `*`: of one call, not a median" if "* |" in text or "* (" in text else ""
                parts.append(f"On {machine}{note}:\n\n{text}")
            if not own:
                parts.append(f"On a {'GPU' if device == 'cuda' else 'CPU'}: {NOT_MEASURED}.")
        if shown and self.caption is not None:
            parts.append(self.caption(shown))
        return "\n\n".join(parts)


EVERYWHERE = ("cpu", "cuda")
TABLES = {
    "quick_seeds": Table(_quick_seeds, ("quick_seeds",), caption=_quick_seeds_caption),
    "quick_seeds_each": Table(
        _quick_seeds_each, ("quick_seeds",), caption=_quick_seeds_each_caption
    ),
    "world_models": Table(_world_models, ("world_models",), caption=_world_models_caption),
    "chance": Table(lambda rows: _grid(*chance_table(rows)), ("chance",), caption=chance_caption),
    "on_policy": Table(_on_policy, ("on_policy",), caption=_on_policy_caption),
    "pgd_returns": Table(
        lambda rows: _grid(*returns_table(rows)), ("pgd_returns",), caption=returns_caption
    ),
    "pgd_trajectories": Table(
        lambda rows: _grid(*trajectories_table(rows)),
        ("pgd_trajectories",),
        caption=trajectories_caption,
    ),
    "reproduced_models": Table(
        lambda rows: _grid(*models_table(rows)), ("reproduced_models",), caption=models_caption
    ),
    "reproduced_actions": Table(
        lambda rows: _grid(*actions_table(rows)), ("reproduced_actions",), caption=actions_caption
    ),
    "reproduced_trainings": Table(
        lambda rows: _grid(*trainings_table(rows)),
        ("reproduced_trainings",),
        caption=trainings_caption,
    ),
    "learning_curves": Table(
        _learning_curves, ("learning_curves",), caption=_learning_curves_caption
    ),
    "attribution": Table(_attribution, ("attribution",), caption=_attribution_caption),
    "claims": _claims,
    "speed": _speed,
    "sampler_cpu": Table(_sampler_steps, ("sampler step",), caption=_sampler_steps_caption),
    "edm_samples": Table(_edm_samples, ("edm sample",), caption=_edm_samples_caption),
    "samples": Table(_samples, ("sample",), EVERYWHERE),
    "updates": Table(
        _updates, ("denoiser update", "A2C update", "whole update", "replay windows"), EVERYWHERE
    ),
    "offline_updates": Table(_offline_updates, ("offline update",), EVERYWHERE),
    "kernels": Table(
        _kernels, ("residual_mlp layer", "guided_step", "generalized_advantages"), EVERYWHERE
    ),
    "environments": Table(_environments, ("environment step", "dynamics replay")),
    "provenance": _provenance,
}


def update_readme(path: Path, rows: Iterable[Row], check: bool) -> list[str]:
    """Write a file's tables anew, or only look; return the names of those that differed.

    Raises:
        InputError: the file cannot be read, or its markers are wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {path}: {reason}") from None
    try:
        stale = stale_tables(text, rows)
        if stale and not check:
            write_bytes_atomic(path, render(text, rows).encode())
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return stale
