"""What PolyGRAD's experiments with world models share (arXiv 2312.08533, sections 5.1 and 5.2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polygrad_fast.arguments import as_choices, as_device
from polygrad_fast.config import WorldModelScale
from polygrad_fast.data.environment import make_environment
from polygrad_fast.diagnostics.actions import action_report
from polygrad_fast.diagnostics.dynamics import windows_report
from polygrad_fast.diagnostics.episodes import RecordedWindows, dataset_windows
from polygrad_fast.diagnostics.guidance import tune_guidance
from polygrad_fast.diagnostics.mujoco_replay import MujocoReplay
from polygrad_fast.diagnostics.on_policy import on_policy_statistics
from polygrad_fast.diagnostics.rollouts import imagine
from polygrad_fast.diagnostics.simulator import check_determined
from polygrad_fast.diagnostics.timing import seconds_per_1000
from polygrad_fast.errors import InputError, NonFiniteError
from polygrad_fast.offline.runs import fit_world_model
from polygrad_fast.offline.task import load_task
from polygrad_fast.offline.world_model import (
    TrainedWorldModel,
    load_world_model,
    split_episodes,
)
from polygrad_fast.policy import GaussianPolicy
from polygrad_fast.reproduce.experiment import Experiment, dataset_simulator
from polygrad_fast.reproduce.imitation import as_lists, imitate, imitation_of
from polygrad_fast.reproduce.polygrad_models import (
    MODELS,
    TRAINED_AS,
    Variant,
    training_config,
    variants,
)
from polygrad_fast.reproduce.stages import Stages
from polygrad_fast.threads import cpu_threads

RECIPE = "mixed-noise"
BATCH_SIZE = 1024
"""Trajectories imagined at a time where no time is measured."""
TIMED_CALLS = 2
BINS = np.linspace(-5, 5, 81)
"""Of histograms of standardized actions; values beyond count in the outermost."""


class ModelExperiment(Experiment):
    """World models of one dataset per environment, and what each of them does; every part is made
    when it is first asked for.

    The target policy, under which all of them imagine, is the dataset's behaviour policy without
    the noise on its actions, or imitates it where it is of a file.

    Args:
        stages: in the experiments' folder.
        scale: sizes.
    """

    def __init__(self, stages: Stages, scale: WorldModelScale):
        numbers = scale.dataset_steps, scale.behaviour_seed, scale.medium_return
        super().__init__(stages, *numbers, scale.policies)
        self.scale, self.device = scale, as_device("auto")
        self._scenes: dict[str, Scene] = {}
        self._trained: dict[str, Path] = {}  # run directories of finished trainings

    def check(self) -> None:
        """Raise InputError, before any work, where something cannot be made or measured."""
        scale = self.scale
        as_choices(scale.models, "models", MODELS)
        self.check_datasets(scale.env_ids, [RECIPE])
        made = {each.model for horizon in scale.horizons for each in variants(scale, horizon)}
        for model in scale.models:
            if model not in made:
                raise InputError(
                    f"--diffusion-steps must have a number above a horizon for model {model}, got "
                    f"{list(scale.diffusion_steps)} with --horizons {list(scale.horizons)}"
                )
        for env_id in scale.env_ids:
            environment = make_environment(env_id)
            MujocoReplay(environment)
            check_determined(environment)
            environment.close()
            for horizon in scale.horizons:
                for variant in variants(scale, horizon):
                    self._config(env_id, variant)

    def scene(self, env_id: str) -> Scene:
        """Return what trajectories of an environment are measured with."""
        if env_id not in self._scenes:
            self._scenes[env_id] = Scene(self, env_id)
        return self._scenes[env_id]

    def model(self, env_id: str, variant: Variant, seed: int) -> TrainedWorldModel:
        """Return a trained world model."""
        name = f"world_models/{env_id}/{_trained_name(variant)}-{seed}"
        if name not in self._trained:
            dataset, config = str(self.dataset(env_id, RECIPE)), self._config(env_id, variant)
            options = self.scale.model_updates, self.scale.held_out, self.scale.preset, seed
            self._trained[name] = self.stages.train(
                name,
                lambda path, resume: fit_world_model(
                    dataset, path, config, *options, self.device, resume
                ),
            )
        return load_world_model(self._trained[name], variant.sampler, self.device)

    def errors(self, env_id: str, variant: Variant, seed: int) -> dict[str, Any]:
        """Return errors of trajectories from held-out states and statistics of their actions.

        "mse" and "floor": lists of each step's mean squared error, of imagined observations and of
        the simulator's own; other names: numbers over all steps of the horizon but the last. All
        are None where something imagined is not finite.
        """
        names = ("measured_trajectories", "tuning_samples", "tuning_trajectories")
        return self._result("errors", env_id, variant, seed, names, self._measure_errors)

    def actions(self, env_id: str, variant: Variant, seed: int) -> dict[str, Any]:
        """Return statistics of imagined actions by `str(sigma)`, each with "counts" in `BINS`; a
        sigma at which something imagined is not finite has None."""
        names = ("measured_trajectories", "tuning_samples", "tuning_trajectories", "sigmas")
        return self._result("actions", env_id, variant, seed, names, self._measure_actions)

    def seconds(self, env_id: str, variant: Variant, seed: int) -> float:
        """Return the seconds of 1,000 trajectories: of one processor, or by the clock on a GPU; the
        median of some calls after a first one."""
        names = ("timed_trajectories",)
        found = self._result("seconds", env_id, variant, seed, names, self._measure_seconds)
        return found["seconds_per_1000"]

    def _config(self, env_id: str, variant: Variant) -> Any:
        trained = TRAINED_AS.get(variant.model, variant.model)
        config = training_config(self.scale, env_id, trained, variant.trained_horizon)
        return dataclasses.replace(config, log_interval=100, checkpoint_interval=1000)

    def _result(
        self,
        kind: str,
        env_id: str,
        variant: Variant,
        seed: int,
        names: Sequence[str],
        measure: Callable[[Scene, Variant, int], dict[str, Any]],
    ) -> dict[str, Any]:
        own = ("dataset_steps", "behaviour_seed", "medium_return", "held_out", "preset")
        own += ("model_updates", "model_batch_size", *names)
        if variant.steps is not None:
            own += ("denoiser", "diffusion_steps")
        case = {"env_id": env_id, **variant._asdict(), "seed": seed}
        case["window"] = self._config(env_id, variant).horizon
        inputs = case | {name: getattr(self.scale, name) for name in own}
        inputs["policy_file"] = bool(self.scale.policies)
        steps = "" if variant.steps is None else f"-{variant.steps}"
        name = f"{kind}/{env_id}-{variant.model}{steps}-{variant.horizon}-{seed}"

        def compute() -> dict[str, Any]:
            with cpu_threads(1, self.device):
                found = measure(self.scene(env_id), variant, seed)
            shown = f"{env_id}, {variant.label}, horizon {variant.horizon}, seed {seed}"
            self.stages.tell(f"{shown}: {_in_words(kind, found)}")
            return found

        return self.stages.result(name, inputs, compute)

    def _measure_errors(self, scene: Scene, variant: Variant, seed: int) -> dict[str, Any]:
        trained = self.model(scene.env_id, variant, seed)
        model, normalizer = trained.model, trained.normalizer
        windows = scene.windows(variant.horizon)
        self._tune(scene, variant, trained, scene.policy, seed)
        try:
            batch = imagine(
                model,
                scene.policy,
                normalizer.normalize(scene.starts(windows), "observations"),
                self._stream(seed),
                BATCH_SIZE,
                variant.horizon,
            )
        except NonFiniteError:
            return {"mse": None}
        scaler = scene.task.scaler
        report = windows_report(
            scene.replay, windows, batch, normalizer, scaler, (variant.horizon,)
        )
        flags = (normalizer.unnormalize(batch.terminals, "terminals") > 0.5).to(batch.rewards.dtype)
        z = on_policy_statistics(scene.policy, normalizer, batch.observations, batch.actions, flags)
        rows, summary = report.rows(), report.summary()
        names = {"mean_mse": "mse", "mean_floor": "floor"}
        names |= {name: name for name in ("reward_mse", "terminal_agreement", "left_out")}
        numbers = {to: summary[name][str(variant.horizon)] for to, name in names.items()}
        return {
            "mse": [row["mse"] for row in rows],
            "floor": [row["floor_mse"] for row in rows],
            **numbers,
            **vars(z),
        }

    def _measure_actions(self, scene: Scene, variant: Variant, seed: int) -> dict[str, Any]:
        trained = self.model(scene.env_id, variant, seed)
        windows = scene.windows(variant.horizon)
        found: dict[str, Any] = {}
        for sigma in sorted(self.scale.sigmas, reverse=True):  # the scale is tuned further
            self._tune(scene, variant, trained, scene.policy.with_std(sigma), seed)
            try:
                report = action_report(
                    trained.model,
                    scene.policy,
                    trained.normalizer,
                    scene.starts(windows),
                    sigma,
                    seed,
                    BATCH_SIZE,
                )
            except NonFiniteError:
                found[str(sigma)] = None
                continue
            counts, _ = np.histogram(np.clip(report.values, BINS[0], BINS[-1]), BINS)
            found[str(sigma)] = report.summary() | {"counts": counts.tolist()}
        return found

    def _measure_seconds(self, scene: Scene, variant: Variant, seed: int) -> dict[str, Any]:
        model = self.model(scene.env_id, variant, seed).model
        number, stream = self.scale.timed_trajectories, self._stream(seed)
        observations = scene.draw_starts(number, stream)
        options = scene.policy, observations, stream, variant.horizon, TIMED_CALLS
        return {"seconds_per_1000": seconds_per_1000(model, *options)}

    def _tune(
        self,
        scene: Scene,
        variant: Variant,
        trained: TrainedWorldModel,
        policy: GaussianPolicy,
        seed: int,
    ) -> None:
        """Find the guidance scale for a policy, from states of the training's episodes."""
        if variant.is_guided:
            scale = self.scale
            tune_guidance(
                trained.model,
                policy,
                lambda stream: scene.draw_starts(scale.tuning_trajectories, stream),
                self._stream(seed, 1),
                scale.tuning_samples,
            )

    def _stream(self, *numbers: int) -> torch.Generator:
        seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
        return torch.Generator(self.device).manual_seed(seed)


class Scene:
    """A dataset's held-out episodes in the simulator, and the policy that they are of.

    Args:
        experiment: makes the dataset.
        env_id: the environment.

    Attributes:
        task: the dataset. policy: of the dataset, on raw observations. replay: of the environment.
    """

    def __init__(self, experiment: ModelExperiment, env_id: str):
        self.env_id, self._experiment = env_id, experiment
        self.task = load_task(str(experiment.dataset(env_id, RECIPE)))
        self._trained, self._held_out = split_episodes(self.task.dataset, experiment.scale.held_out)
        self._windows: dict[int, RecordedWindows] = {}
        for horizon in experiment.scale.horizons:  # there are too few for one of them, or never
            self.windows(horizon)

    @cached_property
    def policy(self) -> GaussianPolicy:
        """The target policy, on raw observations."""
        experiment = self._experiment
        stored = experiment.policy_file(self.env_id)
        if stored is None:
            agent = experiment.behaviour(self.env_id, RECIPE).reach("medium")
            policy = agent.policy.on_raw_observations()
        else:

            def fit() -> dict[str, Any]:
                policy, r2 = imitate(stored, self.task)
                experiment.stages.tell(f"{self.env_id}: the file's policy is imitated, R2 {r2:.4f}")
                return {"r2": r2, "weights": as_lists(policy)}

            inputs = {"dataset_fingerprint": self.task.identity["dataset_fingerprint"]}
            found = experiment.stages.result(f"policies/{self.env_id}", inputs, fit)
            policy = imitation_of(found["weights"], *stored.dims)
        return policy.requires_grad_(False).to(experiment.device)

    @cached_property
    def replay(self) -> MujocoReplay:
        """What plays given actions."""
        return MujocoReplay(make_environment(self.env_id))

    def windows(self, horizon: int) -> RecordedWindows:
        """Return held-out windows, the same for all seeds."""
        if horizon not in self._windows:
            held_out = self._held_out
            actions = self.task.scaler.to_environment(held_out.actions)
            self._windows[horizon] = dataset_windows(
                self.replay,
                dataset_simulator(self.replay.environment, self.task, 0),
                dataclasses.replace(held_out, actions=actions),
                self._experiment.scale.measured_trajectories,
                horizon - 1,
                0,
            )
        return self._windows[horizon]

    def starts(self, windows: RecordedWindows) -> Tensor:
        """Return the raw first observations [N, S] of windows."""
        return torch.from_numpy(windows.observations).to(self._experiment.device)

    def draw_starts(self, number: int, generator: torch.Generator) -> Tensor:
        """Draw raw observations [N, S] of the episodes that models train on."""
        observations = self._trained.observations
        picks = torch.randint(
            len(observations), (number,), generator=generator, device=generator.device
        )
        return torch.from_numpy(observations[picks.cpu().numpy()]).to(generator.device)


def _trained_name(variant: Variant) -> str:
    name = TRAINED_AS.get(variant.model, variant.model)
    horizon = variant.trained_horizon
    return name if horizon is None else f"{name}-{horizon}"


def _in_words(kind: str, found: Mapping[str, Any]) -> str:
    if kind == "seconds":
        return f"{found['seconds_per_1000']:.3g} s for 1,000 trajectories"
    if kind == "errors":
        if found["mse"] is None:
            return "what it imagines is not finite"
        return f"squared error {found['mean_mse'] or float('nan'):.3g}, KS {found['ks']:.3g}"
    shown = (
        f"{sigma} {'not finite' if numbers is None else format(numbers['ks'], '.3g')}"
        for sigma, numbers in found.items()
    )
    return f"KS at sigma {', '.join(shown)}"
