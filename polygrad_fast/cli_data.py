"""Commands of datasets: data collect.

What takes long to import is imported by the command that needs it, as in `cli`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tqdm import tqdm

from polygrad_fast.arguments import as_integer
from polygrad_fast.errors import InputError
from polygrad_fast.runs.directory import read_run_config
from polygrad_fast.runs.interrupts import end_on_interrupt

if TYPE_CHECKING:
    import gymnasium

    from polygrad_fast.data.collect import Act
    from polygrad_fast.data.offline_dataset import OfflineDataset

POLICY_FILE = ".safetensors"


@dataclass(frozen=True)
class Collect:
    """Play episodes and write them as a Minari dataset, or as .npz; with --recipe the policy is
    trained first. An interrupted --recipe continues where it was."""

    env_id: str
    """Gymnasium environment with Box observations and actions, e.g. Hopper-v5."""
    out: Path
    """A folder that is not there yet, for a Minari dataset, or a file .npz."""
    policy: str = "random"
    """"random", the run directory of a trained agent, a policy file (.safetensors, as those in
    benchmarks/policies), or a model of Stable-Baselines3 (.zip), whose loading runs code that it
    holds. With --recipe medium-replay, medium or mixed-noise, the run directory of the behaviour
    policy, which then is not trained; with medium or mixed-noise also its policy file."""
    recipe: Literal["medium-replay", "medium", "medium-expert", "mixed-noise"] | None = None
    """Train a behaviour policy (preset laptop, world model autoregressive) up to --medium-return:
    medium-replay is all its training steps, medium its episodes, medium-expert half of them and
    half of those at --expert-return, mixed-noise its episodes with --noise-std."""
    episodes: int | None = None
    """Default 10; with --recipe 50,000 steps."""
    steps: int | None = None
    """Play on until there are so many steps, instead of --episodes."""
    seed: int = 0
    """Seed of the episodes, the policy's draws and the noise; with --recipe of the training too."""
    checkpoint: Literal["best", "last"] = "best"
    """Of a run directory: the best-evaluated policy, or the last one."""
    deterministic: bool = False
    """Take the policy's mean instead of drawing from it."""
    noise_std: tuple[float, ...] = ()
    """Gaussian noise added to the actions, in units of half their range; several: for the episodes
    in turn, as 0 0.2 0.5 (the default of mixed-noise)."""
    run_dir: str = ""
    """Of --recipe: where the behaviour policy is trained; default
    runs/ENV_ID-behaviour-SEED."""
    medium_return: float | None = None
    """Mean return of 10 episodes from which on a policy is medium; default 1000 on Hopper and
    Walker2d, 1800 on HalfCheetah, 300 on InvertedPendulum."""
    expert_return: float | None = None
    """Likewise for an expert; default 3000, 3000, 5500 and 950."""
    progress: bool = True
    """Show a progress bar."""


def _collect(command: Collect) -> None:
    for name in ("episodes", "steps"):
        if getattr(command, name) is not None:
            as_integer(getattr(command, name), f"--{name}", 1)
    if command.episodes is not None and command.steps is not None:
        raise InputError(
            f"one of --episodes and --steps must be left out, got {command.episodes} and "
            f"{command.steps}"
        )
    as_integer(command.seed, "--seed", 0, below=2**32)
    _check_recipe(command)
    with end_on_interrupt():
        from polygrad_fast.data.collect import check_noise
        from polygrad_fast.data.environment import check_spaces, make_environment
        from polygrad_fast.data.write import check_output, write_dataset

        check_output(command.out)
        env = make_environment(command.env_id)
        check_spaces(env)
        check_noise(env, command.noise_std)
        collect = _from_policy if command.recipe is None else _from_recipe
        make = collect(command, env)
    dataset = make()
    write_dataset(dataset, command.out, env)
    made = dataset.recipe
    print(
        f"{made['steps']:,} steps of {made['episodes']:,} episodes in {command.out}: mean return "
        f"{made['mean_return']:.2f}, standard deviation {made['std_return']:.2f}"
    )
    summary = ("episodes", "steps", "mean_return", "std_return")
    print(json.dumps({name: made[name] for name in summary}))


def _check_recipe(command: Collect) -> None:
    """Raise InputError for options that have no effect."""
    options = ("run_dir", "medium_return", "expert_return")
    if command.recipe is None:
        for name in options:
            if getattr(command, name) not in ("", None):
                flag = f"--{name.replace('_', '-')}"
                raise InputError(f"{flag} needs --recipe, got {getattr(command, name)}")
        return
    if command.run_dir and command.policy != "random":
        raise InputError(
            f"--run-dir must be left out with --policy, which is trained already, got "
            f"{command.run_dir}"
        )
    if command.expert_return is not None and command.recipe != "medium-expert":
        raise InputError(
            f"--expert-return must be left out with --recipe {command.recipe}, got "
            f"{command.expert_return:g}"
        )
    if command.deterministic:
        raise InputError("--deterministic must be left out with --recipe, whose policies are drawn")
    if command.noise_std and command.recipe != "mixed-noise":
        raise InputError(f"--noise-std must be left out with --recipe {command.recipe}")
    if command.recipe == "medium-replay":
        if command.episodes is not None or command.steps is not None:
            raise InputError(
                "--episodes and --steps must be left out with --recipe medium-replay, which is as "
                "long as the training"
            )


def _from_recipe(command: Collect, env: gymnasium.Env) -> Callable[[], OfflineDataset]:
    from polygrad_fast import recipes

    wanted = {"medium": command.medium_return, "expert": command.expert_return}
    levels = recipes.levels_of(command.recipe)
    returns = recipes.level_returns(command.env_id, levels, wanted)
    noise = command.noise_std or recipes.NOISE_STD
    size = command.episodes, command.steps, command.seed, noise
    if command.policy != "random":
        path = Path(command.policy)
        given = command.recipe, path, env, returns["medium"]
        if path.suffix == POLICY_FILE:
            return lambda: recipes.collect_from_file(*given, *size)
        return lambda: recipes.collect_from_run(*given, command.checkpoint, *size)
    name = re.sub(r"[^\w.-]+", "-", command.env_id)
    run_dir = Path(command.run_dir or f"runs/{name}-behaviour-{command.seed}")
    behaviour = recipes.Behaviour(
        command.env_id, run_dir, command.seed, returns, progress=command.progress
    )
    reached = ", ".join(f"{level} from a mean return of {returns[level]:g} on" for level in levels)
    print(f"{command.recipe}: the behaviour policy is trained in {run_dir} ({reached})")
    return lambda: recipes.collect_recipe(command.recipe, behaviour, *size)


def _from_policy(command: Collect, env: gymnasium.Env) -> Callable[[], OfflineDataset]:
    from polygrad_fast.data.collect import collect_episodes

    act, recipe = _behaviour(command, env)
    episodes = 10 if command.episodes is None and command.steps is None else command.episodes

    def play() -> OfflineDataset:
        total, unit = (episodes, "episode") if command.steps is None else (command.steps, "step")
        with tqdm(total=total, unit=unit, disable=not command.progress) as bar:

            def show(episode_return: float, length: int) -> None:
                bar.set_postfix_str(f"return {episode_return:.1f}, {length} steps", refresh=False)
                bar.update(1 if command.steps is None else length)

            return collect_episodes(
                env, act, episodes, command.seed, command.noise_std, recipe, show, command.steps
            )

    return play


def _behaviour(command: Collect, env: gymnasium.Env) -> tuple[Act, dict[str, Any]]:
    """Return the policy to collect with, and what the dataset's recipe says of it."""
    from polygrad_fast.data.collect import random_actions
    from polygrad_fast.data.environment import check_spaces, environment_name

    dims = check_spaces(env)
    if command.policy == "random":
        if command.deterministic:
            raise InputError("--deterministic needs a policy with a mean, got --policy random")
        return random_actions(env, command.seed), {"policy": "random"}
    path = Path(command.policy)
    recipe = {"policy": command.policy, "deterministic": command.deterministic}
    if path.suffix == POLICY_FILE:
        import numpy as np

        from polygrad_fast.data.policy_file import load_policy

        policy = load_policy(path, environment_name(env), dims)
        recipe |= {"trained_by": policy.facts.recipe, "evaluated_return": policy.facts.mean_return}
        draws = None if command.deterministic else np.random.default_rng(command.seed)
        return lambda observation: policy.act(observation, draws), recipe
    if path.is_file():
        from polygrad_fast.data.sb3 import load_stable_baselines3

        act = load_stable_baselines3(path, dims, command.deterministic, command.seed)
        return act, recipe
    if not path.is_dir():
        raise InputError(
            f"--policy must be 'random', a run directory or a file, got {command.policy!r}, which "
            f"is not there"
        )
    stored = read_run_config(path)
    import torch

    from polygrad_fast.agent import PolyGRAD

    agent = PolyGRAD.load(path, device="cpu", checkpoint=command.checkpoint)
    found = agent.replay.observation_dim, agent.replay.action_dim
    if found != dims:
        raise InputError(
            f"--policy must be of an environment with (observation, action) dimensions {dims} as "
            f"{command.env_id}, got {found} of {agent.env_id}"
        )
    recipe |= {
        "checkpoint": command.checkpoint,
        "env_step": agent.num_timesteps,
        "trained_in": agent.env_id,
        "preset": stored["preset"],
        "training_seed": stored["seed"],
    }
    generator = None if command.deterministic else torch.Generator().manual_seed(command.seed)
    actor = agent.training.actor
    return lambda observation: actor.predict(observation, generator), recipe


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {"data collect": (Collect, _collect)}
"""Options of each command, and what runs it."""
