"""Figures 5 and 6 of policy-guided diffusion: are guided trajectories the target policy's, and are
they true?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from polygrad_fast.arguments import as_choices, as_device
from polygrad_fast.config import PGDScale
from polygrad_fast.data.environment import make_environment
from polygrad_fast.diagnostics.trajectories import trajectory_errors
from polygrad_fast.errors import NonFiniteError
from polygrad_fast.evaluation.plots import plot_estimates
from polygrad_fast.offline.agents import build_agent
from polygrad_fast.offline.diffusion import load_diffusion, seeded
from polygrad_fast.offline.ensemble import as_distribution, load_ensemble
from polygrad_fast.offline.generation import generate
from polygrad_fast.offline.loop import load_named_weights
from polygrad_fast.offline.task import OfflineTask, load_task
from polygrad_fast.recipes import RECIPES
from polygrad_fast.reproduce.experiment import dataset_simulator, observation_scale
from polygrad_fast.reproduce.pgd import PGDExperiment, action_log_likelihood
from polygrad_fast.reproduce.stages import Stages, write_table
from polygrad_fast.reproduce.statistics import estimated
from polygrad_fast.runs.checkpoint import load_checkpoint
from polygrad_fast.runs.restore import checkpoint_to_load
from polygrad_fast.sampling.edm_sampler import EDMSampler
from polygrad_fast.sampling.policy_score import PolicyGuidance
from polygrad_fast.trajectory_normalizer import TrajectoryParts

UNTRAINED = "random"


def pgd_likelihood(stages: Stages, scale: PGDScale, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Measure how likely sampled actions are under target policies (figure 5); write
    pgd-likelihood.csv and .png, and return the rows."""
    rows = _measured(stages, scale, seeds, scale.lengths[:1], "log_likelihood")
    return _written(stages, rows, "pgd-likelihood", "mean log-likelihood of actions", log=False)


def pgd_error(stages: Stages, scale: PGDScale, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Measure the error of sampled trajectories against the simulator that replays their actions
    (figure 6); write pgd-error.csv and .png, and return the rows."""
    rows = _measured(stages, scale, seeds, scale.lengths, "mse")
    return _written(stages, rows, "pgd-error", "squared error, normalized observations", log=True)


def _measured(
    stages: Stages, scale: PGDScale, seeds: Sequence[int], lengths: Sequence[int], quantity: str
) -> list[dict[str, Any]]:
    """Return a row per environment, target, length and source, over seeds."""
    as_choices(scale.targets, "targets", (UNTRAINED, *RECIPES))
    as_choices([scale.model_recipe], "model_recipe", RECIPES)
    trained = [target for target in scale.targets if target != UNTRAINED]
    PGDExperiment(stages, scale).check_datasets(scale.env_ids, [scale.model_recipe, *trained])
    rows = []
    found: dict[tuple, list[dict[str, Any]]] = {}
    for seed in seeds:
        for env_id in scale.env_ids:
            measure = Measurement(stages, scale, env_id, seed)
            for target in scale.targets:
                for length in lengths:
                    for coefficient in (*scale.coefficients, None):
                        key = env_id, target, length, coefficient
                        found.setdefault(key, []).append(measure(target, length, coefficient))
    for (env_id, target, length, coefficient), results in found.items():
        source = "ensemble" if coefficient is None else f"lambda {coefficient:g}"
        row = {"env_id": env_id, "model_recipe": scale.model_recipe, "target": target}
        row |= {"length": length, "source": source}
        rows.append(row | estimated([result[quantity] for result in results]))
    return rows


def _written(
    stages: Stages, rows: list[dict[str, Any]], name: str, label: str, log: bool
) -> list[dict[str, Any]]:
    write_table(stages.folder / f"{name}.csv", rows)
    panels: dict[str, dict[str, list[tuple]]] = {}
    for row in rows:
        if "iqm" in row:
            panel = panels.setdefault(f"{row['env_id']}, {row['length']} rows", {})
            point = (row["source"], row["iqm"], row["low"], row["high"])
            panel.setdefault(f"target {row['target']}", []).append(point)
    title = "Sampled trajectories, by guidance and target policy"
    plot_estimates(panels, stages.folder / f"{name}.png", label, title, log)
    return rows


class Measurement:
    """Samples trajectories of one environment and seed, and measures them.

    Args:
        stages, scale: of the experiment.
        env_id: the environment.
        seed: of models, target policies and trajectories.
    """

    def __init__(self, stages: Stages, scale: PGDScale, env_id: str, seed: int):
        self.stages, self.scale, self.env_id, self.seed = stages, scale, env_id, seed
        self.experiment = PGDExperiment(stages, scale)
        self.device = as_device("auto")

    def __call__(self, target: str, length: int, coefficient: float | None) -> dict[str, Any]:
        """Return "log_likelihood" and "mse", "median" and "counted" of trajectories.

        Args:
            target: the target policy's dataset, or `UNTRAINED`.
            length: rows of a trajectory.
            coefficient: of guidance; None: of the ensemble, in which the target policy acts.
        """
        scale, recipe = self.scale, self.scale.model_recipe
        source = "ensemble" if coefficient is None else f"lambda_{coefficient:g}"
        updates = "ensemble_updates" if coefficient is None else "diffusion_updates"
        names = ("dataset_steps", "behaviour_seed", "preset", "agent_updates", updates)
        names += ("measured_trajectories",)
        case = {"env_id": self.env_id, "model_recipe": recipe, "target": target, "length": length}
        case |= {"coefficient": coefficient, "seed": self.seed}
        inputs = case | {name: getattr(scale, name) for name in names}
        name = f"trajectories/{self.env_id}-{recipe}-{target}-{length}-{source}-{self.seed}"
        return self.stages.result(name, inputs, lambda: self._measure(target, length, coefficient))

    def _measure(self, target: str, length: int, coefficient: float | None) -> dict[str, Any]:
        dataset = self.experiment.dataset(self.env_id, self.scale.model_recipe)
        task = load_task(str(dataset))
        policy = self._policy(task, target)
        if coefficient is None:
            parts = self._imagined(task, policy, length)
        else:
            parts = self._sampled(policy, length, coefficient)
        likelihood = action_log_likelihood(
            policy, parts.observations.flatten(0, 1), parts.actions.flatten(0, 1)
        )
        errors = self._errors(task, parts)
        counted = errors[np.isfinite(errors)]
        found = {
            "log_likelihood": likelihood,
            "mse": float(counted.mean()) if len(counted) else None,
            "median": float(np.median(counted)) if len(counted) else None,
            "counted": len(counted),
        }
        source = "ensemble" if coefficient is None else f"lambda {coefficient:g}"
        self.stages.tell(
            f"{self.env_id}, target {target}, {length} rows, {source}, seed {self.seed}: "
            f"log-likelihood {likelihood:.3g}, squared error {found['mse'] or float('nan'):.3g}"
        )
        return found

    def _policy(self, task: OfflineTask, target: str) -> nn.Module:
        """Return a target policy: IQL's on real data."""
        config = self.experiment.train_config(self.scale.agent_updates)
        dims = task.dataset.observation_dim, task.dataset.action_dim
        moments = torch.zeros(dims[0]), torch.ones(dims[0])  # the weights hold them
        generator = seeded(self.seed, 0)
        agent = build_agent("iql", config, *dims, moments, generator, self.device)
        if target != UNTRAINED:
            run_dir = self.experiment.agent(self.env_id, target, "iql", "real", self.seed)
            path, _ = checkpoint_to_load(run_dir, "last")
            load_named_weights(agent.modules(), load_checkpoint(path)[0], str(path))
        return agent.policy.requires_grad_(False)

    def _sampled(self, policy: nn.Module, length: int, coefficient: float) -> TrajectoryParts:
        """Return raw trajectories of the diffusion model."""
        scale = self.scale
        run_dir = self.experiment.diffusion(self.env_id, scale.model_recipe, self.seed)
        model = load_diffusion(run_dir, self.device)
        config = self.experiment.train_config(scale.agent_updates)
        sampler = EDMSampler(model.network, config.sampler, config.engine, config.dtype, "auto")
        guidance = None
        if coefficient > 0:
            options = dataclasses.replace(config.guidance, coefficient=coefficient)
            guidance = PolicyGuidance(policy, model.normalizer, options)
        found = generate(
            sampler,
            scale.measured_trajectories,
            length,
            self.seed,
            None,
            config.sampling_batch_size,
            guidance,
            self.stages.progress,
        )
        return model.normalizer.unnormalize(found.to(self.device))

    def _imagined(self, task: OfflineTask, policy: nn.Module, length: int) -> TrajectoryParts:
        """Return raw trajectories of the ensemble, from the dataset's states."""
        run_dir = self.experiment.ensemble(self.env_id, self.scale.model_recipe, self.seed)
        model = load_ensemble(run_dir, self.device).model
        generator = torch.Generator(self.device).manual_seed(self.seed)
        states = task.dataset.transitions().observations.to(self.device)
        shape = (self.scale.measured_trajectories,)
        picks = torch.randint(len(states), shape, generator=generator, device=self.device)
        batch = model.imagine(states[picks], as_distribution(policy), generator, horizon=length)
        if not torch.isfinite(batch.observations).all():
            raise NonFiniteError("a trajectory imagined by the ensemble holds NaN or infinity")
        actions = batch.actions.clamp(-1.0, 1.0)  # as the ensemble saw them
        return TrajectoryParts(batch.observations, actions, batch.rewards, batch.terminals)

    def _errors(self, task: OfflineTask, parts: TrajectoryParts) -> np.ndarray:
        """Return squared errors [N, T - 1], NaN where nothing counts."""
        environment = make_environment(self.env_id)
        simulator = dataset_simulator(environment, task, self.seed)
        scale = observation_scale(task)
        observations, actions, terminals = (
            part.cpu().numpy() for part in (parts.observations, parts.actions, parts.terminals)
        )
        flat = task.scaler.to_environment(actions.reshape(-1, actions.shape[-1]))
        errors = trajectory_errors(
            simulator, observations, flat.reshape(actions.shape), terminals, scale
        )
        environment.close()
        return errors
