"""Datasets by a recipe: a behaviour policy is trained first, then it is played.

The policy is this library's own, preset "laptop" with the world model "autoregressive". It is
"medium" at the first evaluation whose mean return reaches a threshold, and "expert" at the first
that reaches a higher one; what it was then is kept in the run directory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

from polygrad_fast.agent import PolyGRAD
from polygrad_fast.arguments import as_integer
from polygrad_fast.config import TrainConfig
from polygrad_fast.data.actions import ActionScaler
from polygrad_fast.data.collect import Act, collect_episodes, describe_episodes
from polygrad_fast.data.environment import check_spaces, environment_name, make_environment
from polygrad_fast.data.offline_dataset import OfflineDataset
from polygrad_fast.data.policy_file import load_policy
from polygrad_fast.data.replay import ReplayBuffer
from polygrad_fast.errors import InputError
from polygrad_fast.runs.directory import read_run_config
from polygrad_fast.runs.metrics import read_metrics

RECIPES = ("medium-replay", "medium", "medium-expert", "mixed-noise")
LEVELS = ("medium", "expert")
RETURNS = {
    "HalfCheetah": (1800.0, 5500.0),
    "Hopper": (1000.0, 3000.0),
    "InvertedPendulum": (300.0, 950.0),
    "Walker2d": (1000.0, 3000.0),
}
"""Mean returns of the levels by the environment's name without version; "expert" is what a laptop
reaches, "medium" a third of it. D4RL's levels are higher: a third of what hours of SAC reach."""
STEPS = 50_000
"""Steps of a dataset where neither steps nor episodes are asked for."""
NOISE_STD = (0.0, 0.2, 0.5)
"""Of mixed-noise: of the episodes in turn, in units of half the actions' range."""

OnEpisode = Callable[[float, int], None]


def behaviour_config(env_id: str) -> TrainConfig:
    """Return how behaviour policies are trained."""
    return dataclasses.replace(
        TrainConfig.from_preset("laptop"),
        world_model="autoregressive",
        policy_updates_per_env_step=0.5,
        eval_interval=2500,
    )


def levels_of(recipe: str) -> tuple[str, ...]:
    """Return the levels whose policies a recipe needs.

    Raises:
        InputError: an unknown recipe.
    """
    if recipe not in RECIPES:
        raise InputError(f"recipe must be one of {list(RECIPES)}, got {recipe!r}")
    return LEVELS if recipe == "medium-expert" else ("medium",)


def level_returns(
    env_id: str, levels: Sequence[str], given: Mapping[str, float | None]
) -> dict[str, float]:
    """Return the mean return of each level, given or from `RETURNS`.

    Raises:
        InputError: none is given or known for the environment, or medium is above expert.
    """
    base = env_id.rsplit(":")[-1].rsplit("/")[-1].rpartition("-v")[0]
    known = dict(zip(LEVELS, RETURNS.get(base, (None, None)), strict=True))
    found = {}
    for level in levels:
        value = known[level] if given.get(level) is None else given[level]
        if value is None:
            raise InputError(
                f"--{level}-return must be given for {env_id}: known are those of {sorted(RETURNS)}"
            )
        found[level] = value
    ordered = list(found.values())
    if ordered != sorted(ordered):
        raise InputError(
            f"--medium-return must be at most --expert-return, {found['expert']:g}, got "
            f"{found['medium']:g}"
        )
    return found


class Behaviour:
    """A policy trained in a run directory, as it was at each level; begun, or continued.

    Args:
        env_id: the environment.
        run_dir: its run directory, new or that of the same training.
        seed: of the training.
        returns: of the levels, see `level_returns`.
        config: default `behaviour_config`.
        progress: show a progress bar.

    Raises:
        InputError: the directory holds another run.
    """

    def __init__(
        self,
        env_id: str,
        run_dir: Path,
        seed: int,
        returns: Mapping[str, float],
        config: TrainConfig | None = None,
        progress: bool = False,
    ):
        self.env_id, self.run_dir, self.seed = env_id, run_dir, as_integer(seed, "seed", 0, 2**32)
        self.returns, self._progress = returns, progress
        self.config = (config or behaviour_config(env_id)).resolved(env_id)
        if (run_dir / "config.json").exists():
            self._check_same()

    def _check_same(self) -> None:
        stored = read_run_config(self.run_dir)
        wanted = {"env_id": self.env_id, "seed": self.seed}
        wanted["config"] = dataclasses.asdict(self.config)
        for name, value in wanted.items():
            if stored[name] != value:
                raise InputError(
                    f"--run-dir {self.run_dir} holds another behaviour policy: its {name} is "
                    f"{stored[name]}, wanted {value}"
                )

    def reach(self, level: str) -> PolyGRAD:
        """Return the agent as it was when it reached a level, trained until then.

        Raises:
            InputError: training ends before, or had passed the level before it was asked for.
        """
        kept = self.run_dir / level
        if not kept.exists():
            self._train(level).save(kept)
        agent = PolyGRAD.load(kept, device="cpu")
        step = agent.num_timesteps
        if not self._is_reached(level, step):
            raise InputError(
                f"the {level} policy in {kept} must reach a mean return of "
                f"{self.returns[level]:g} (--{level}-return), got that of step {step:,}, "
                f"{self.return_at(step):.0f}: give another --run-dir"
            )
        return agent

    def _train(self, level: str) -> PolyGRAD:
        total = self.config.total_timesteps
        begun = (self.run_dir / "config.json").exists()
        if begun:
            agent = PolyGRAD.resume(self.run_dir, device="cpu")
        else:
            options = {"preset": "laptop", "seed": self.seed, "device": "cpu"}
            agent = PolyGRAD(self.env_id, config=self.config, run_dir=self.run_dir, **options)
        if not self._is_reached(level, agent.num_timesteps) and agent.num_timesteps < total:

            def goes_on(agent: PolyGRAD, _: dict[str, float]) -> bool:
                return not self._is_reached(level, agent.num_timesteps)

            agent.learn(total - agent.num_timesteps, goes_on, self._progress)
        if self._is_reached(level, agent.num_timesteps):
            return agent
        best = max(self._evaluations().values(), default=-np.inf)
        raise InputError(
            f"the behaviour policy in {self.run_dir} must reach a mean return of "
            f"{self.returns[level]:g} "
            f"(--{level}-return) within {total:,} steps, got {best:.0f} at best: give a lower "
            f"return or another --seed and --run-dir"
        )

    def _evaluations(self) -> dict[int, float]:
        path = self.run_dir / "metrics.csv"
        return evaluations(path) if path.exists() else {}

    def _is_reached(self, level: str, step: int) -> bool:
        trained = step > self.config.learning_starts
        return trained and self.return_at(step) >= self.returns[level]

    def return_at(self, step: int) -> float:
        """Return the mean return of the evaluation after `step` steps, -inf where there is none."""
        return self._evaluations().get(step, -np.inf)

    def describe(self, agent: PolyGRAD, level: str) -> dict[str, Any]:
        """Return what a dataset's recipe says of the policy."""
        step = agent.num_timesteps
        return _described(agent, level, step, self.returns[level], self.return_at(step))


def _described(
    agent: PolyGRAD, level: str, step: int, wanted: float, evaluated: float
) -> dict[str, Any]:
    config = agent.config
    return {
        "policy": level,
        "trained_by": f"PolyGRAD, preset {agent.preset}, world model {config.world_model}, "
        f"{config.policy_updates_per_env_step:g} policy updates per environment step",
        "training_seed": agent.seed,
        "env_step": step,
        "wanted_return": wanted,
        "evaluated_return": evaluated,
    }


def evaluations(path: Path) -> dict[int, float]:
    """Return the evaluations in a metrics.csv: environment step -> mean return."""
    rows = (row for row in read_metrics(path) if "eval/mean_reward" in row)
    return {int(row["env_step"]): row["eval/mean_reward"] for row in rows}


def collect_recipe(
    recipe: str,
    behaviour: Behaviour,
    num_episodes: int | None = None,
    num_steps: int | None = None,
    seed: int = 0,
    noise_std: Sequence[float] = NOISE_STD,
    on_episode: OnEpisode | None = None,
) -> OfflineDataset:
    """Return the dataset of a recipe, its behaviour policy trained first where it is not yet.

    - "medium-replay": all steps of the training up to the first medium policy.
    - "medium": whole episodes of that policy, drawn stochastically.
    - "medium-expert": half of it is medium, half of the first expert policy.
    - "mixed-noise": episodes of the medium policy with Gaussian noise on its actions.

    Args:
        recipe: one of `RECIPES`.
        behaviour: the policy.
        num_episodes, num_steps: of the dataset, see `collect_episodes`; of neither: `STEPS` steps.
            Not of medium-replay, which is as long as its training.
        seed: of the episodes, draws and noise.
        noise_std: of mixed-noise.
        on_episode: see `collect_episodes`.

    Raises:
        InputError: unknown recipe, a number out of range, or a level that is not reached.
    """
    levels = levels_of(recipe)
    if recipe == "medium-replay":
        agent = behaviour.reach("medium")
        return replay_dataset(
            agent.replay,
            agent.action_scaler,
            agent.env_id,
            {"recipe": recipe, "seed": behaviour.seed, **behaviour.describe(agent, "medium")},
        )
    if num_episodes is None and num_steps is None:
        num_steps = STEPS
    parts = []
    for number, level in enumerate(levels):
        agent = behaviour.reach(level)
        env = make_environment(behaviour.env_id)
        described = {"recipe": recipe, **behaviour.describe(agent, level)}
        parts.append(
            collect_episodes(
                env,
                stochastic_actions(agent, seed + number),
                _share(num_episodes, len(levels)),
                seed + number,
                noise_std if recipe == "mixed-noise" else (),
                described,
                on_episode,
                _share(num_steps, len(levels)),
            )
        )
        env.close()
    return parts[0] if len(parts) == 1 else _joined(recipe, parts)


def _share(number: int | None, parts: int) -> int | None:
    return None if number is None else max(1, number // parts)


def _joined(recipe: str, parts: Sequence[OfflineDataset]) -> OfflineDataset:
    whole = OfflineDataset.concatenate(parts)
    described = {"recipe": recipe, "policy": recipe, "parts": [part.recipe for part in parts]}
    return dataclasses.replace(whole, recipe=described | describe_episodes(whole))


def stochastic_actions(agent: PolyGRAD, seed: int) -> Act:
    """Return a policy's actions in the environment's units, drawn from a stream of their own."""
    generator = torch.Generator().manual_seed(seed)
    actor = agent.training.actor
    return lambda observation: actor.predict(observation, generator)


def replay_dataset(
    replay: ReplayBuffer,
    scaler: ActionScaler,
    env_id: str,
    recipe: Mapping[str, Any],
    until: int | None = None,
) -> OfflineDataset:
    """Return the steps of a replay buffer as a dataset.

    The buffer has no observation after an episode's last step. A cut-off episode therefore ends one
    step earlier here, and after a terminal step its own observation stands for the next one, which
    no learner reads.

    Args:
        replay: the buffer.
        scaler: from its actions to the environment's.
        env_id: the environment's name.
        recipe: what the dataset says of itself, with counts and returns.
        until: only steps before this one, counted from the run's beginning; None: all.

    Raises:
        InputError: no whole step of an episode.
    """
    state = replay.state_dict()
    oldest = state["total_steps"] - len(state["steps"])
    rows = state["steps"].numpy()[: None if until is None else max(0, until - oldest)]
    # two steps are of one episode where a window holds both
    changes = np.zeros(len(state["steps"]) + 1, dtype=np.int64)
    first, last = (state["starts"] - oldest).numpy().T
    np.add.at(changes, first, 1)
    np.add.at(changes, last, -1)
    goes_on = (np.cumsum(changes[:-1]) > 0)[: len(rows)]
    if len(rows):
        goes_on[-1] = False
    dims = replay.observation_dim, replay.action_dim
    observations, actions, rewards, terminals = np.split(rows, np.cumsum((*dims, 1)), axis=1)
    terminals = terminals[:, 0] > 0
    following = np.where(goes_on[:, None], np.roll(observations, -1, axis=0), observations)
    kept = goes_on | terminals
    if not kept.any():
        raise InputError(
            f"the replay buffer must hold steps of whole windows, got {len(rows)} steps"
        )
    ends = (terminals | ~np.append(goes_on[1:] | terminals[1:], False))[kept]
    dataset = OfflineDataset(
        observations[kept],
        scaler.to_environment(actions[kept]),
        rewards[kept, 0],
        following[kept],
        terminals[kept],
        ends & ~terminals[kept],
        source=env_id,
        ends=ends,
        true_next=True,
        env_id=env_id,
    )
    described = {**recipe, "terminal_next_observations": "repeated"}
    return dataclasses.replace(dataset, recipe=described | describe_episodes(dataset))


def collect_from_run(
    recipe: str,
    run_dir: Path,
    env: gymnasium.Env,
    medium_return: float,
    checkpoint: str = "last",
    num_episodes: int | None = None,
    num_steps: int | None = None,
    seed: int = 0,
    noise_std: Sequence[float] = NOISE_STD,
    on_episode: OnEpisode | None = None,
) -> OfflineDataset:
    """Return the dataset of a recipe whose behaviour policy is that of a run of `train`.

    Args:
        recipe: "medium-replay": the run's steps up to the first evaluation that reached the return;
            "medium" and "mixed-noise": episodes of the policy of a checkpoint whose evaluation
            reached it.
        run_dir: of the run.
        env: the environment to play in.
        medium_return: mean return from which on a policy is medium.
        checkpoint: "best" or "last", of medium and mixed-noise.
        num_episodes, num_steps, seed, noise_std, on_episode: of these, see `collect_recipe`.

    Raises:
        InputError: another recipe, a run of another environment, or the return was not reached.
        CheckpointError: no run of `train`, or no checkpoint that can be used.
    """
    _check_needs_one_policy(recipe, run_dir, ("medium-replay", "medium", "mixed-noise"))
    read_run_config(run_dir)
    name = environment_name(env)
    replays = recipe == "medium-replay"
    agent = PolyGRAD.load(run_dir, device="cpu", checkpoint="last" if replays else checkpoint)
    if agent.env_id != name:
        raise InputError(f"--policy must be a run of {name}, got one of {agent.env_id}")
    found = evaluations(run_dir / "metrics.csv")
    begun = agent.config.learning_starts
    asked = [step for step in found if step > begun and (replays or step == agent.num_timesteps)]
    reached = [step for step in sorted(asked) if found[step] >= medium_return]
    if not reached:
        best = max((found[step] for step in asked), default=-np.inf)
        raise InputError(
            f"--policy {run_dir} must have reached a mean return of {medium_return:g} "
            f"(--medium-return), got {best:.0f}{'' if replays else f' of its {checkpoint} policy'}"
        )
    step = reached[0]
    described = {"recipe": recipe}
    described |= _described(agent, "medium", step, medium_return, found[step])
    if replays:
        return replay_dataset(agent.replay, agent.action_scaler, name, described, step)
    act = stochastic_actions(agent, seed)
    return _play(env, act, described, num_episodes, num_steps, seed, noise_std, on_episode)


def collect_from_file(
    recipe: str,
    path: Path,
    env: gymnasium.Env,
    medium_return: float,
    num_episodes: int | None = None,
    num_steps: int | None = None,
    seed: int = 0,
    noise_std: Sequence[float] = NOISE_STD,
    on_episode: OnEpisode | None = None,
) -> OfflineDataset:
    """Return the dataset of a recipe whose behaviour policy is that of a policy file.

    Args:
        recipe: "medium" or "mixed-noise".
        path: of the file, see `data.policy_file`.
        env: the environment to play in.
        medium_return: what the policy's stored mean return must have reached.
        num_episodes, num_steps, seed, noise_std, on_episode: see `collect_recipe`.

    Raises:
        InputError: another recipe, no usable file, one of another environment, or of a lower
            return.
    """
    _check_needs_one_policy(recipe, path, ("medium", "mixed-noise"))
    policy = load_policy(path, environment_name(env), check_spaces(env))
    facts = policy.facts
    if facts.mean_return < medium_return:
        raise InputError(
            f"--policy {path} must have reached a mean return of {medium_return:g} "
            f"(--medium-return), got {facts.mean_return:.0f}"
        )
    described = {
        "recipe": recipe,
        "policy": "medium",
        "trained_by": facts.trained_by,
        "training_seed": facts.seed,
        "env_step": facts.env_steps,
        "wanted_return": medium_return,
        "evaluated_return": facts.mean_return,
    }
    generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(2,)))

    def act(observation: np.ndarray) -> np.ndarray:
        return policy.act(observation, generator)

    return _play(env, act, described, num_episodes, num_steps, seed, noise_std, on_episode)


def _check_needs_one_policy(recipe: str, policy: Path, allowed: tuple[str, ...]) -> None:
    if recipe not in allowed:
        raise InputError(
            f"--policy {policy} must be left out with --recipe {recipe}: it serves "
            f"{' and '.join(allowed)}"
        )


def _play(
    env: gymnasium.Env,
    act: Act,
    described: dict[str, Any],
    num_episodes: int | None,
    num_steps: int | None,
    seed: int,
    noise_std: Sequence[float],
    on_episode: OnEpisode | None,
) -> OfflineDataset:
    """Return episodes of a medium policy, with noise where the recipe is mixed-noise."""
    if num_episodes is None and num_steps is None:
        num_steps = STEPS
    noise = tuple(noise_std) if described["recipe"] == "mixed-noise" else ()
    return collect_episodes(env, act, num_episodes, seed, noise, described, on_episode, num_steps)
