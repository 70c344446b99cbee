"""Stored policies are what their files and their README say, and exports play as their model."""

from pathlib import Path

import numpy as np
import pytest

from harness.policies import with_table
from polygrad_fast.data.environment import make_environment
from polygrad_fast.data.policy_file import load_policy
from polygrad_fast.evaluation.returns import evaluate_policy

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "policies"
FILES = sorted(FOLDER.glob("*.safetensors"))


def test_the_readme_is_made_of_the_files():
    text = (FOLDER / "README.md").read_text()
    assert with_table(text, FOLDER) == text
    assert {path.stem for path in FILES} == {"HalfCheetah-v5", "Hopper-v5", "Walker2d-v5"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_stored_policy_walks(path):
    assert path.stat().st_size <= 300_000
    policy = load_policy(path, path.stem)
    environments = [make_environment(path.stem) for _ in range(3)]
    result = evaluate_policy(policy.act, environments, [1, 2, 3])
    assert result.mean_reward > 0.5 * policy.facts.mean_return > 500


@pytest.mark.parametrize("algorithm", ["ppo", "sac"])
def test_an_export_acts_as_the_model_does(algorithm, tmp_path):
    pytest.importorskip("stable_baselines3")
    import export_policies

    from polygrad_fast.baselines import load_model, train_baseline

    normalize = algorithm == "ppo"
    rates = {"n_steps": 32, "learning_rate": 0.01} if normalize else {"learning_starts": 20}
    options = {"num_envs": 2, "normalize": normalize, "hyperparameters": rates | {"gamma": 0.9}}
    train_baseline(algorithm, "Pendulum-v1", tmp_path / "run", 120, 3, 60, 1, **options)
    policy = export_policies.export(tmp_path / "run", tmp_path, 2, 5)
    stored = load_policy(tmp_path / "Pendulum-v1.safetensors", "Pendulum-v1")
    assert stored.facts == policy.facts and stored.facts.episodes == 2
    steps = stored.facts.env_steps
    assert steps in (0, 60, 120)
    assert f"--algo {algorithm} --total-timesteps {steps} --seed 3" in stored.facts.recipe
    assert stored.facts.recipe.endswith(" gamma=0.9")
    assert ("--normalize" in stored.facts.recipe) == normalize
    model = load_model(algorithm, tmp_path / "run" / "best.zip")
    observations = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    wanted, _ = model.predict(observations, deterministic=True)
    assert np.abs(stored.act(observations) - wanted).max() < 0.02 * wanted.std()
    model.set_random_seed(0)
    drawn, _ = model.predict(np.repeat(observations[:1], 4000, axis=0), deterministic=False)
    own = stored.act(np.repeat(observations[:1], 4000, axis=0), np.random.default_rng(0))
    assert own.std() == pytest.approx(drawn.std(), rel=0.06)
