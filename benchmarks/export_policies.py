"""Store the best policies of baseline runs as small files, and list them.

    polygrad-fast baseline --env-id Hopper-v5 --algo ppo --run-dir runs/hopper_ppo ..
    python benchmarks/export_policies.py runs/hopper_ppo

Every file is one policy in half precision with its recipe and the return of fresh episodes that it
played from the file itself; benchmarks/policies/README.md has the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import nn

from harness.policies import list_policies
from polygrad_fast.baselines import ALGORITHMS, ON_POLICY, load_model, read_baseline_config
from polygrad_fast.data.environment import make_environment
from polygrad_fast.data.policy_file import PolicyFacts, StoredPolicy, load_policy, save_policy
from polygrad_fast.errors import InputError
from polygrad_fast.evaluation.environments import EvaluationEnvironments
from polygrad_fast.evaluation.evaluator import Evaluator
from polygrad_fast.runs.metrics import read_metrics

FOLDER = Path(__file__).parent / "policies"
ACTIVATIONS = {nn.ReLU: "relu", nn.Tanh: "tanh"}
DEFAULTS = {"seed": 0, "eval_interval": 5000, "eval_episodes": 10, "num_envs": 1}
"""Of `polygrad-fast baseline`, left out of the recipe."""


def recipe_of(config: dict[str, Any], env_steps: int) -> str:
    """Return the command whose last policy is that of a run with this config.json after so many
    environment steps: no hyperparameter in JSON depends on how many there will be."""
    words = ["polygrad-fast", "baseline", "--env-id", config["env_id"]]
    words += ["--algo", config["baseline"], "--total-timesteps", str(env_steps)]
    for name, default in DEFAULTS.items():
        if config[name] != default:
            words += [f"--{name.replace('_', '-')}", str(config[name])]
    if config["normalize"]:
        words.append("--normalize")
    options = config["hyperparameters"]
    if options:
        words += ["--hyperparameters", *(f"{k}={json.dumps(v)}" for k, v in options.items())]
    return shlex.join(words)


def policy_of(model: BaseAlgorithm, algorithm: str, facts: dict[str, Any]) -> StoredPolicy:
    """Return the policy of a model of Stable-Baselines3, its return not measured yet.

    Raises:
        InputError: an algorithm without a Gaussian policy, or layers that are not of an MLP.
    """
    if algorithm in ON_POLICY:
        policy = model.policy
        hidden, mean = policy.mlp_extractor.policy_net, policy.action_net
        log_std = None, _array(policy.log_std)
    elif algorithm == "sac":
        hidden, mean = model.actor.latent_pi, model.actor.mu
        log_std = _array(model.actor.log_std.weight), _array(model.actor.log_std.bias)
    else:
        raise InputError(f"a run must be of {[*ON_POLICY, 'sac']}, got one of {algorithm}")
    between = {type(layer) for layer in hidden if not isinstance(layer, nn.Linear)}
    if len(between) != 1 or not between <= set(ACTIVATIONS):
        raise InputError(f"hidden layers must be followed by ReLU or tanh, got {between}")
    linear = [layer for layer in hidden if isinstance(layer, nn.Linear)] + [mean]
    facts = PolicyFacts(
        activation=ACTIVATIONS[between.pop()],
        squashed=algorithm not in ON_POLICY,
        mean_return=0.0,
        std_return=0.0,
        episodes=0,
        **facts,
    )
    layers = tuple((_array(layer.weight), _array(layer.bias)) for layer in linear)
    space = model.action_space
    return StoredPolicy(layers, log_std, (space.low, space.high), facts)


def _array(parameter: torch.Tensor):
    return parameter.detach().numpy()


def export(run_dir: Path, folder: Path, episodes: int, evaluation_seed: int) -> StoredPolicy:
    """Write the policy of a run's best.zip, evaluated as it is stored; return it."""
    config = read_baseline_config(run_dir)
    try:
        versions = json.loads((run_dir / "versions.json").read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{run_dir} is not a run of polygrad-fast baseline: {error}") from None
    env_id, algorithm = config["env_id"], config["baseline"]
    rows = [row for row in read_metrics(run_dir / "metrics.csv") if "eval/mean_reward" in row]
    best = [row for row in rows if row["eval/mean_reward"] == row["eval/best_mean_reward"]][-1]
    env_steps = int(best["env_step"])
    facts = {
        "env_id": env_id,
        "algorithm": f"{ALGORITHMS[algorithm][1]} of {config['package']}",
        "env_steps": env_steps,
        "seed": config["seed"],
        "recipe": recipe_of(config, env_steps),
        "evaluation_seed": evaluation_seed,
        "versions": versions,
    }
    policy = policy_of(load_model(algorithm, run_dir / "best.zip"), algorithm, facts)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "policy.safetensors"
        save_policy(policy, path)
        stored = load_policy(path)
    environments = EvaluationEnvironments(make_environment(env_id), env_id)
    evaluator = Evaluator(lambda observations, _: stored.act(observations), environments, 0)
    result = evaluator.evaluate(episodes, evaluation_seed)
    measured = dataclasses.replace(
        policy.facts,
        mean_return=result.mean_reward,
        std_return=result.std_reward,
        episodes=episodes,
    )
    policy = dataclasses.replace(policy, facts=measured)
    save_policy(policy, folder / f"{env_id}.safetensors")
    return policy


def main(arguments: list[str] | None = None) -> int:
    """Export the runs of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dirs", type=Path, nargs="*", help="of `polygrad-fast baseline`")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder (%(default)s)")
    parser.add_argument("--episodes", type=int, default=100, help="fresh ones (%(default)s)")
    parser.add_argument("--seed", type=int, default=12345, help="of these (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        list_policies(options.out)  # a folder without a place for the table is refused now
        for run_dir in options.run_dirs:
            facts = export(run_dir, options.out, options.episodes, options.seed).facts
            print(f"{facts.env_id}: {facts.mean_return:.0f} +- {facts.std_return:.0f}", flush=True)
        list_policies(options.out)
    except InputError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
