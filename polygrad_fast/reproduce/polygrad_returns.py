"""Figures 6 and 8 of PolyGRAD: learning curves of training in imagination beside model-free
algorithms, and of its ablations.

The paper shows its returns as plots, without numbers, so the column "paper" is empty.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_args, get_type_hints

import numpy as np

from polygrad_fast.arguments import as_choices
from polygrad_fast.baselines import ALGORITHMS, find_algorithm
from polygrad_fast.config import GuidanceConfig, SamplerConfig, TrainConfig, TrainingScale
from polygrad_fast.data.environment import check_spaces, make_environment
from polygrad_fast.errors import NonFiniteError
from polygrad_fast.evaluation.plots import plot_curves
from polygrad_fast.recipes import evaluations
from polygrad_fast.reproduce.stages import Stages, write_table
from polygrad_fast.reproduce.statistics import estimated

WORLD_MODELS = get_args(get_type_hints(TrainConfig)["world_model"])
ABLATIONS: dict[str, dict[str, Any]] = {
    "base": {},
    "random_actions": {"action_update": "none"},
    "policy_sampling": {"action_update": "sample"},
    "no_clipping": {"clip_std": None},
    "state_update": {"update_states": True},
    "noisy_states": {"policy_input": "noisy"},
    "exact": {"action_update": "exact", "clip_state_change": None},
}
"""Options of the sampler that differ from the released code's (appendix C.4)."""


def fig6(stages: Stages, scale: TrainingScale, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Train in imagination and model-free for the same environment steps; write fig6.csv and .png,
    and return the rows: one per environment, algorithm and evaluation."""
    as_choices(scale.algorithms, "algorithms", (*WORLD_MODELS, *ALGORITHMS))
    for name in scale.algorithms:
        if name in ALGORITHMS:
            find_algorithm(name)
    base = _base(scale)

    def train(env_id: str, name: str, seed: int) -> dict[str, Any]:
        if name in ALGORITHMS:
            return _model_free(stages, env_id, name, seed, base)
        return _imagined(stages, scale, env_id, name, seed, replace(base, world_model=name))

    title = "Training in imagination, and model-free"
    return _compared(stages, scale, seeds, "fig6", "algorithm", scale.algorithms, train, title)


def fig8(stages: Stages, scale: TrainingScale, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Train PolyGRAD and its ablations; write fig8.csv and .png, and return the rows: one per
    environment, ablation and evaluation."""
    as_choices(scale.ablations, "ablations", ABLATIONS)
    base = _base(scale)

    def train(env_id: str, name: str, seed: int) -> dict[str, Any]:
        config = ablated(base, name)
        return _imagined(stages, scale, env_id, f"ablation-{name}", seed, config)

    title = "PolyGRAD and its ablations"
    return _compared(stages, scale, seeds, "fig8", "ablation", scale.ablations, train, title)


def ablated(base: TrainConfig, name: str) -> TrainConfig:
    """Return a training's options with the released code's trajectory diffusion, ablated.

    Where the base's denoiser is of kind "rollout", a residual MLP of its size, 16 diffusion steps
    and a guidance scale that is learnt quickly take its place.
    """
    sampler = SamplerConfig.official(denoiser_actions=base.sampler.denoiser_actions)
    changed: dict[str, Any] = {"sampler": replace(sampler, **ABLATIONS[name])}
    if base.denoiser.kind == "rollout":
        changed["denoiser"] = replace(base.denoiser, kind="residual_mlp")
        changed["schedule"] = replace(base.schedule, num_train_timesteps=16)
        changed["guidance"] = GuidanceConfig(initial=0.05, learning_rate=0.03)
    return replace(base, world_model="trajectory_diffusion", **changed)


def _base(scale: TrainingScale) -> TrainConfig:
    """Return the options of a training but for its world model; raise InputError for what cannot be
    trained."""
    as_choices(scale.env_ids, "env_ids", scale.env_ids)
    for env_id in scale.env_ids:
        environment = make_environment(env_id)
        check_spaces(environment)
        environment.close()
    config = TrainConfig.from_preset(scale.preset)
    if scale.total_timesteps is not None:
        config = replace(config, total_timesteps=scale.total_timesteps)
    return config


def _imagined(
    stages: Stages,
    scale: TrainingScale,
    env_id: str,
    name: str,
    seed: int,
    config: TrainConfig,
) -> dict[str, Any]:
    """Return the evaluations of a training in imagination."""
    case = {"env_id": env_id, "algorithm": name, "seed": seed, "preset": scale.preset}
    path = f"trainings/{env_id}/{name}-{seed}"

    def train() -> dict[str, Any]:
        met_nan = None
        try:
            stages.agent(path, env_id, scale.preset, seed, config)
        except NonFiniteError as error:
            met_nan = str(error)
            stages.tell(f"{path}: {met_nan}")
        return _evaluated(stages, path) | {"met_nan": met_nan}

    inputs = case | {"config": dataclasses.asdict(config)}
    return stages.result(path, inputs, train)


def _model_free(
    stages: Stages, env_id: str, name: str, seed: int, base: TrainConfig
) -> dict[str, Any]:
    """Return the evaluations of a model-free training, at the same environment steps."""
    path = f"trainings/{env_id}/{name}-{seed}"
    options = {name: getattr(base, name) for name in ("eval_interval", "eval_episodes")}
    options |= {"total_timesteps": base.total_timesteps, "seed": seed}

    def train() -> dict[str, Any]:
        stages.baseline(path, name, env_id, **options)
        return _evaluated(stages, path) | {"met_nan": None}

    return stages.result(path, {"env_id": env_id, "algorithm": name, **options}, train)


def _evaluated(stages: Stages, path: str) -> dict[str, Any]:
    found = evaluations(stages.folder / path / "metrics.csv")
    return {"env_steps": list(found), "returns": list(found.values())}


def _compared(
    stages: Stages,
    scale: TrainingScale,
    seeds: Sequence[int],
    figure: str,
    column: str,
    names: Sequence[str],
    train: Callable[[str, str, int], dict[str, Any]],
    title: str,
) -> list[dict[str, Any]]:
    """Train everything, write table and figure, and return the rows."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for seed in seeds:  # all of one seed first: what is there early is a whole table
        for env_id in scale.env_ids:
            for name in names:
                found.setdefault((env_id, name), []).append(train(env_id, name, seed))
    rows, panels = [], {}
    for (env_id, name), results in found.items():
        steps = sorted({step for result in results for step in result["env_steps"]})
        curves = [smoothed_curve(result, steps, scale.smoothing) for result in results]
        points = []
        for i, step in enumerate(steps):
            numbers = estimated([curve[i] for curve in curves])
            row = {"env_id": env_id, column: name, "env_step": step, **numbers, "paper": None}
            rows.append(row | {"met_nan": sum(bool(result["met_nan"]) for result in results)})
            points.append((step, numbers["iqm"], numbers["low"], numbers["high"]))
        panels.setdefault(env_id, {})[name] = points
    write_table(stages.folder / f"{figure}.csv", rows)
    labels = ("environment step", "return of an episode")
    plot_curves(panels, stages.folder / f"{figure}.png", labels, title)
    return rows


def smoothed_curve(result: dict[str, Any], steps: Sequence[int], smoothing: int) -> list[float]:
    """Return a training's mean return at each step: that of its newest evaluation, and the mean of
    so many of the points up to there. A training that met NaN stays where it was."""
    known = dict(zip(result["env_steps"], result["returns"], strict=True))
    held: list[float] = []
    for step in steps:
        held.append(known.get(step, held[-1] if held else result["returns"][0]))
    return [float(np.mean(held[max(0, i + 1 - smoothing) : i + 1])) for i in range(len(held))]
