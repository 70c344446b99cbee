"""Training of agents on real and synthetic data."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from polygrad_fast.config import EDMConfig, IQLConfig, PolicyGuidanceConfig, TD3BCConfig
from polygrad_fast.data.load import load_dataset
from polygrad_fast.errors import CheckpointError, InputError
from polygrad_fast.evaluation.offline import OfflineEvaluation, OfflineEvaluator
from polygrad_fast.evaluation.returns import EpisodeStatistics
from polygrad_fast.offline import agents, synthetic
from polygrad_fast.offline.agents import AgentTraining, comparable_score, load_agent
from polygrad_fast.offline.diffusion import load_diffusion
from polygrad_fast.offline.runs import train_agent
from polygrad_fast.offline.synthetic import SyntheticSets
from polygrad_fast.runs.checkpoint import load_checkpoint, save_checkpoint
from polygrad_fast.runs.metrics import read_metrics
from polygrad_fast.transitions import Transitions


@pytest.fixture(scope="module")
def model(model_dir):
    return load_diffusion(model_dir, "cpu")


@pytest.fixture
def make(task, model, tiny_train):
    def make(data="guided", agent="td3_bc", seed=0, folder=None, evaluator=None, **options):
        config = dataclasses.replace(tiny_train, **options)
        used = None if data == "real" else model
        return AgentTraining(task, config, agent, data, seed, "cpu", used, evaluator, folder)

    return make


def rows_of(training, until):
    rows = []
    while training.num_updates < until:
        training.update()
        rows.append(training.metrics())
    return rows


@pytest.mark.parametrize(("share", "wanted"), [(0.25, 4), (0.0, 0), (1.0, 16)])
def test_a_batch_is_mixed_by_the_ratio(make, share, wanted):
    training = make(real_share=share)
    batch = training.batch()
    real = {tuple(row) for row in training.real.rows.tolist()}
    drawn = [tuple(row) for row in batch.rows.tolist()]
    assert len(drawn) == len(set(drawn)) == 16
    assert sum(row in real for row in drawn) == wanted


def test_the_released_batch_has_16_real_rows(make):
    assert make(batch_size=256, real_share=0.0625, num_trajectories=50).num_real == 16


def test_real_data_are_all_real(make):
    training = make("real")
    real = {tuple(row) for row in training.real.rows.tolist()}
    rows_of(training, 12)
    assert all(tuple(row) in real for row in training.batch().rows.tolist())
    assert training.synthetic is None


def sets_of(training, monkeypatch):
    """Train to the end and return, for each set that is sampled, the updates before it, whether it
    is guided, by which weights, and its seed."""
    found, generate = [], synthetic.generate

    def record(sampler, total, rows, seed, folder, batch_size, guidance, progress):
        guide = None
        if guidance is not None:
            guide = guidance.policy.state_dict()["network.0.weight"].clone()
        found.append((training.num_updates, guide, seed))
        return generate(sampler, total, rows, seed, folder, batch_size, guidance, progress)

    monkeypatch.setattr(synthetic, "generate", record)
    weights = {}
    while training.num_updates < training.total_updates:
        weights[training.num_updates] = training.learner.policy.network[0].weight.detach().clone()
        training.update()
    return found, weights


@pytest.mark.parametrize("agent", ["td3_bc", "iql"])
def test_sets_are_sampled_anew_and_guided_by_the_policy_of_the_time(make, monkeypatch, agent):
    found, weights = sets_of(make(agent=agent), monkeypatch)
    assert [before for before, _, _ in found] == [0, 5, 9]  # the first serves lifetime + 1 updates
    assert found[0][1] is None
    for before, guide, _ in found[1:]:
        assert torch.equal(guide, weights[before])
    assert len({seed for _, _, seed in found}) == 3


def test_the_first_set_may_be_guided(make, monkeypatch):
    found, weights = sets_of(make(first_unguided=False), monkeypatch)
    assert torch.equal(found[0][1], weights[0])


def test_unguided_sets_are_sampled_anew_too(make, monkeypatch):
    found, _ = sets_of(make("unguided"), monkeypatch)
    assert [before for before, _, _ in found] == [0, 5, 9]
    assert all(guide is None for _, guide, _ in found)


def test_guidance_moves_actions_towards_the_policy(make):
    options = {"first_unguided": False, "sampler": EDMConfig.paper(num_inference_steps=16)}
    strong = PolicyGuidanceConfig(coefficient=4.0, normalize=True, denoised=True)
    error = {}
    for data in ("unguided", "guided"):
        training = make(data, guidance=strong, **options)
        table = training.synthetic.table(0)
        wanted = training.learner.policy(table.observations)
        error[data] = float((table.actions - wanted).square().mean())
    assert error["guided"] < 0.2 * error["unguided"]


@pytest.mark.parametrize(("rows", "wanted"), [(None, 6), (6, 5), (9, 8)])
def test_rows_of_a_trajectory(make, rows, wanted):
    assert len(make(trajectory_rows=rows).synthetic.table(0)) == 20 * wanted


def test_one_row_more_keeps_the_terminals(make, model, monkeypatch):
    """Windows are terminal in their last row only, here row 5 of 6."""

    def sample(sampler, total, rows, *_):
        trajectories = torch.zeros(total, rows, 6)
        trajectories[:, 5, -1] = 1.0 / float(model.normalizer.std[-1])
        return trajectories

    monkeypatch.setattr(synthetic, "generate", sample)
    assert float(make().synthetic.table(0).terminals.sum()) == 20
    assert float(make(trajectory_rows=6).synthetic.table(0).terminals.sum()) == 0


@pytest.mark.parametrize("at", [4, 7])
@pytest.mark.parametrize("agent", ["td3_bc", "iql"])
@pytest.mark.parametrize("keep_files", [True, False])
def test_a_resumed_training_is_the_same_to_the_bit(make, task, tmp_path, at, agent, keep_files):
    def evaluator():
        return OfflineEvaluator("Pendulum-v1", 2, 0)

    options = {"agent": agent, "seed": 3}
    whole = make(folder=tmp_path / "whole", evaluator=evaluator(), **options)
    rows = rows_of(whole, 12)
    folder = tmp_path / "part"
    part = make(folder=folder, evaluator=evaluator(), **options)
    head = rows_of(part, at)
    save_checkpoint(tmp_path / "c", part.weights(), part.state_dict(), {})
    rows_of(part, 11)  # on from there: the kill comes later than the checkpoint
    weights, state, _ = load_checkpoint(tmp_path / "c")
    later = folder if keep_files else tmp_path / "empty"
    continued = make(folder=later, evaluator=evaluator(), **options)
    torch.manual_seed(3)
    continued.load(weights, state, "here")
    assert head + rows_of(continued, 12) == rows
    assert rows[4] and rows[5] and not rows[0]
    for name, tensor in whole.weights().items():
        assert torch.equal(tensor, continued.weights()[name]), name
    assert continued.best_mean_reward == whole.best_mean_reward is not None


def test_files_of_a_set_are_used_and_replaced_where_damaged(make, tmp_path, monkeypatch):
    def sets():
        training = make("unguided", folder=tmp_path)
        sampler = training.synthetic.source.sampler
        sample = sampler.sample
        monkeypatch.setattr(sampler, "sample", lambda *a, **k: calls.append(1) or sample(*a, **k))
        return training.synthetic

    calls = []
    first = sets().table(0)
    assert len(calls) == 3
    assert torch.equal(sets().table(0).rows, first.rows) and len(calls) == 3
    (tmp_path / "set_00000" / "batch_00001.npz").write_bytes(b"no archive")
    with pytest.warns(UserWarning, match="a synthetic set is sampled again: .*batch_00001.npz"):
        assert torch.equal(sets().table(0).rows, first.rows)
    assert len(calls) == 6
    later = sets()
    later.renew(later.guides[0])
    later.table(0)
    assert [path.name for path in tmp_path.iterdir()] == ["set_00001"]
    later.close()
    assert not tmp_path.exists()


def table_of(numbers, each=8) -> Transitions:
    """Rows that hold their number."""
    rows = torch.tensor(numbers, dtype=torch.float32).repeat_interleave(each)
    return Transitions(rows[:, None].repeat(1, 9), 3, 1)


class Counted:
    """Sets whose rows hold how many were sampled before."""

    least, first_guided = 8, False

    def __init__(self):
        self.policies = []

    def sample(self, policy, seed, folder):
        self.policies.append(policy)
        return table_of([len(self.policies) - 1])


def test_the_oldest_of_several_sets_is_replaced_and_all_give_their_share():
    source, policy = Counted(), torch.nn.Linear(1, 1)
    sets = SyntheticSets(source, policy, True, 3, 0, None)
    g = torch.Generator().manual_seed(0)

    def rows(size):
        return [sorted(part.rows[:, 0].tolist()) for part in sets.batch(size, g)]

    assert rows(7) == [[0, 0], [1, 1], [2, 2, 2]]  # the newest gives what does not divide
    assert rows(2) == [[1], [2]] and source.policies == [None] * 3
    for number in (3, 4):
        with torch.no_grad():
            policy.weight.fill_(number)
        sets.renew(policy)
    assert sets.numbers == [3, 4, 2] and rows(6) == [[2, 2], [3, 3], [4, 4]]
    assert [guide.weight.item() for guide in source.policies[3:]] == [3, 4]
    sets.renew(policy)
    assert rows(3) == [[3], [4], [5]] and len(source.policies) == 6


def test_sets_have_seeds_and_files_of_their_own(tmp_path):
    class Noted(Counted):
        def sample(self, policy, seed, folder):
            folder.mkdir(parents=True)
            found.append((seed, folder.name))
            return super().sample(policy, seed, folder)

    found = []
    sets = SyntheticSets(Noted(), torch.nn.Linear(1, 1), False, 2, 0, tmp_path)
    for _ in range(3):
        sets.batch(4, torch.Generator().manual_seed(0))
        sets.renew(torch.nn.Linear(1, 1))
    assert [name for _, name in found] == [f"set_0000{number}" for number in range(4)]
    assert len({seed for seed, _ in found}) == 4
    # the place of set 2 is due, but not yet sampled
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set_00002", "set_00003"]


def test_continuous_generation_is_resumed_to_the_bit(make, tmp_path):
    options = {"num_sets": 3, "lifetime": 2, "real_share": 0.0}
    whole, part = make(**options), make(**options)
    rows = rows_of(whole, 12)
    assert whole.synthetic.numbers == [6, 7, 5]
    rows_of(part, 7)
    save_checkpoint(tmp_path / "c", part.weights(), part.state_dict(), {})
    weights, state, _ = load_checkpoint(tmp_path / "c")
    continued = make(**options)
    continued.load(weights, state, "here")
    assert rows_of(continued, 12) == rows[7:]
    for name, tensor in whole.weights().items():
        assert torch.equal(tensor, continued.weights()[name]), name


def test_the_agents_actions_are_the_environments(make, task):
    training = make("real")
    predict = agents.environment_predict(training.learner, task.scaler)
    observations = task.dataset.observations[:5].copy()
    inner = training.learner.predict(observations)[0]
    assert np.allclose(predict(observations)[0], 2 * inner, atol=1e-6)


def test_options_reach_the_agent(make):
    training = make("real", td3_bc=TD3BCConfig(hidden_dim=8, normalize_observations=True))
    assert training.learner.config.total_updates == 12
    mean, std = training.real.observation_moments()
    assert torch.equal(training.learner.policy.observation_mean, mean)
    assert torch.equal(training.learner.policy.observation_std, std)
    assert make("real", "iql", iql=IQLConfig(hidden_dim=8)).learner.config.hidden_dim == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"agent": "cql"}, r"agent must be one of \['td3_bc', 'iql'\], got 'cql'"),
        ({"data": "dreams"}, "data must be one of .'real', 'unguided', 'guided', 'ensemble'., got"),
        (
            {"guidance": PolicyGuidanceConfig()},
            "guidance.coefficient must be above 0 for guided data, got 0.0",
        ),
        (
            {"sampler": EDMConfig(sigma_data=0.5)},
            "sampler.sigma_data must be 1.0, with which the diffusion model was trained, got 0.5",
        ),
        ({"trajectory_rows": 2, "num_trajectories": 3}, "must hold at least 12 .*, got 3 of 3"),
        ({"num_sets": 0}, "num_sets must be at least 1, got 0"),
        ({"batch_size": 2000, "real_share": 1.0}, "at least 2000 transitions, .* got 1000"),
    ],
)
def test_what_does_not_fit_is_refused(make, arguments, message):
    with pytest.raises(InputError, match=message):
        make(**arguments)


def test_models_that_are_missing_or_in_vain(task, model, tiny_train):
    with pytest.raises(InputError, match="guided data need a diffusion model, got no model"):
        AgentTraining(task, tiny_train, "iql", "guided")
    with pytest.raises(InputError, match="real data need no model, got a diffusion model"):
        AgentTraining(task, tiny_train, "iql", "real", model=model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"observation_dim": 4}, "observation_dim of the dataset must be 4, .* got 3"),
        ({"action_high": [1.0]}, r"action_high of the dataset must be \[1.0\], .* got \[2.0\]"),
        ({"dataset_env_id": "Hopper-v5"}, "environment must be Hopper-v5, .*, got Pendulum-v1"),
    ],
)
def test_a_model_of_another_task_is_refused(task, model, tiny_train, change, message):
    other = dataclasses.replace(model, stored=model.stored | change)
    with pytest.raises(InputError, match=message):
        AgentTraining(task, tiny_train, "iql", "guided", model=other)


def test_a_run_directory_its_best_and_last_agents(dataset_file, tiny_train, tmp_path):
    run_dir = tmp_path / "run"
    config = dataclasses.replace(tiny_train, td3_bc=TD3BCConfig(normalize_observations=True))
    run = train_agent("td3_bc", "real", str(dataset_file), run_dir, config=config, device="cpu")
    run.train(progress=False)
    rows = read_metrics(run_dir / "metrics.csv")
    assert [row["update"] for row in rows] == [0, 5, 6, 10, 12]
    evaluated = {row["update"]: row["eval/mean_reward"] for row in rows if "eval/std_reward" in row}
    assert set(evaluated) == {0, 6, 12}
    best = max(evaluated, key=lambda update: (evaluated[update], update))
    observations = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    predict, stored, updates = load_agent(run_dir, "last", "cpu")
    wanted = 2 * run.training.learner.predict(observations)[0]
    assert np.allclose(predict(observations)[0], wanted, atol=1e-6)
    assert updates == 12 and stored["agent"] == "td3_bc"
    again = OfflineEvaluator("Pendulum-v1", 2, 0).evaluate(predict)
    assert again.episodes.mean_reward == pytest.approx(evaluated[12])
    predict, _, updates = load_agent(run_dir, "best", "cpu")
    assert updates == best
    again = OfflineEvaluator("Pendulum-v1", 2, 0).evaluate(predict)
    assert again.episodes.mean_reward == pytest.approx(evaluated[best])


def test_an_environment_is_needed_to_evaluate(dataset_file, tiny_train, tmp_path):
    dataset = load_dataset(dataset_file)
    names = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
    arrays = {name: getattr(dataset, name) for name in names}
    np.savez(tmp_path / "own.npz", **arrays | {"actions": dataset.actions / 2})
    own, run_dir = str(tmp_path / "own.npz"), tmp_path / "run"
    with pytest.raises(InputError, match="does not name its environment, .* give --env-id"):
        train_agent("iql", "real", own, run_dir, config=tiny_train, device="cpu")
    np.savez(tmp_path / "hopper-medium-v2.npz", **arrays | {"actions": dataset.actions / 2})
    hopper = str(tmp_path / "hopper-medium-v2.npz")
    with pytest.raises(InputError, match="'Hopper-v2' cannot be made"):
        train_agent("iql", "real", hopper, run_dir, config=tiny_train, device="cpu")
    assert not run_dir.exists()
    run = train_agent("iql", "real", own, run_dir, config=tiny_train, env_id="Pendulum-v1")
    assert json.loads((run_dir / "config.json").read_text())["env_id"] == "Pendulum-v1"
    assert run.training.num_updates == 0


def test_another_diffusion_model_is_not_resumed(dataset_file, model_dir, tiny_train, tmp_path):
    arguments = ("iql", "guided", str(dataset_file), tmp_path / "run", model_dir)
    options = {"config": tiny_train, "device": "cpu"}
    train_agent(*arguments, **options)
    path = tmp_path / "run" / "config.json"
    stored = json.loads(path.read_text())
    stored["model_content"]["weights"] = "0" * 64
    path.write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match="model_content.weights of .* as the run began"):
        train_agent(*arguments, **options, resume=True)


def test_scores_only_where_they_are_comparable():
    episodes = EpisodeStatistics(np.array([1.0]), np.array([1]))
    assert comparable_score(OfflineEvaluation(episodes, 5.0, None)) == {"eval/score": 5.0}
    assert comparable_score(OfflineEvaluation(episodes, 5.0, "Hopper-v5 is not Hopper-v2")) == {}
    assert comparable_score(OfflineEvaluation(episodes, None, "no D4RL score")) == {}
