"""A dynamics ensemble of a dataset, and an agent's trajectories in it."""

import dataclasses
import json

import pytest
import torch

from polygrad_fast.config import DynamicsConfig
from polygrad_fast.errors import CheckpointError, InputError, NonFiniteError
from polygrad_fast.offline.agents import AgentTraining
from polygrad_fast.offline.diffusion import load_diffusion
from polygrad_fast.offline.ensemble import EnsembleTraining, load_ensemble, moments_of
from polygrad_fast.offline.runs import train_agent
from polygrad_fast.offline.synthetic import EnsembleSource
from polygrad_fast.runs.checkpoint import load_checkpoint, save_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(ensemble_dir):
    """One that has learnt that nothing ends."""
    found = load_ensemble(ensemble_dir, "cpu")
    with torch.no_grad():
        found.model.network.biases[-1][..., -1] = -99.0
    return found


@pytest.fixture
def make(task, model, tiny_train):
    def make(agent="td3_bc", **options):
        config = dataclasses.replace(tiny_train, **options)
        return AgentTraining(task, config, agent, "ensemble", 0, "cpu", model)

    return make


def test_training_continues_exactly_and_the_loss_falls(task, tiny_dynamics, tmp_path):
    def new():
        return EnsembleTraining(task.dataset, tiny_dynamics, 4, "cpu")

    def train(training, until):
        while training.num_updates < until:
            training.update()
            rows.append(training.metrics())

    rows: list[dict] = []
    whole, part, continued = new(), new(), new()
    train(whole, 12)
    wanted, rows = rows, []
    assert wanted[11]["dynamics/loss"] < wanted[3]["dynamics/loss"] and not wanted[0]
    train(part, 7)
    save_checkpoint(tmp_path / "c", part.weights(), part.state_dict(), {})
    weights, state, _ = load_checkpoint(tmp_path / "c")
    torch.manual_seed(9)
    continued.load(weights, state, "here")
    train(continued, 12)
    assert rows == wanted
    for name, tensor in whole.weights().items():
        assert torch.equal(tensor, continued.weights()[name]), name
    other = EnsembleTraining(task.dataset, tiny_dynamics, 5, "cpu")
    assert not torch.equal(other.model.network.weights[0], new().model.network.weights[0])


def test_a_loaded_ensemble_is_the_trained_one(task, ensemble_dir):
    model = load_ensemble(ensemble_dir, "cpu")
    weights, _, _ = load_checkpoint(sorted((ensemble_dir / "checkpoints").glob("step_*"))[-1])
    for name, tensor in model.model.network.state_dict().items():
        assert torch.equal(tensor, weights[f"ema_dynamics.{name}"]), name
    wanted = moments_of(task.dataset.transitions())
    assert torch.equal(model.model.normalizer.observations_mean, wanted.observations_mean)
    assert model.num_updates == 12 and model.describe()["num_updates"] == 12


def test_the_normalizer_has_the_datasets_moments(task):
    transitions = task.dataset.transitions()
    found = moments_of(transitions)
    for name in ("observations", "actions"):
        normed = found.normalize(getattr(transitions, name), name)
        assert torch.allclose(normed.mean(0), torch.zeros(normed.shape[1]), atol=1e-4)
        assert torch.allclose(normed.std(0, correction=0), torch.ones(normed.shape[1]), atol=1e-3)


def test_sets_are_the_policys_from_the_datasets_states(make, task):
    training = make()
    table, policy = training.synthetic.table(0), training.learner.policy
    assert training.synthetic.guide(0) is not None  # also in the first set
    assert len(table) == 20 * 5  # rows of the windows' length and 1, less the last
    with torch.no_grad():
        assert torch.allclose(table.actions, policy(table.observations), atol=1e-5)
    first = table.observations.view(20, 5, 3)[:, 0]
    known = {tuple(row) for row in task.dataset.observations.tolist()}
    assert all(tuple(row) in known for row in first.tolist())
    chained = table.next_observations.view(20, 5, 3)[:, :-1]
    assert torch.equal(chained, table.observations.view(20, 5, 3)[:, 1:])
    assert torch.equal(make().synthetic.table(0).rows, table.rows)


def test_a_stochastic_policys_actions_are_drawn_and_clipped(make):
    training = make("iql")
    table = training.synthetic.table(0)
    assert table.actions.abs().max() == 1  # its standard deviation is 1
    mean, _ = training.learner.policy(table.observations)
    assert (table.actions - mean).std() > 0.3


def test_nothing_is_taken_after_a_terminal_step(task, model, tiny_train):
    source = EnsembleSource(task, model, tiny_train, CPU)
    network = source.model.network
    kept = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    try:
        with torch.no_grad():
            network.weights[-1].zero_()
            network.biases[-1][..., -1] = 1.0  # the first step is terminal
        table = source.sample(lambda o: torch.zeros(len(o), 1), 0, None)
        assert len(table) == 20 == source.least and (table.terminals == 1).all()
        with torch.no_grad():
            network.biases[-1].fill_(float("nan"))
        with pytest.raises(NonFiniteError, match="imagined by the ensemble holds NaN"):
            source.sample(lambda o: torch.zeros(len(o), 1), 0, None)
    finally:
        network.load_state_dict(kept)


def test_sets_are_renewed_by_the_policy_of_the_time(make):
    training = make()
    while training.num_updates < 6:
        training.update()
    assert training.synthetic.numbers == [1]
    table = training.synthetic.table(0)
    guide = training.synthetic.guides[0]
    with torch.no_grad():
        assert torch.allclose(table.actions, guide(table.observations), atol=1e-5)
        assert not torch.allclose(table.actions, training.learner.policy(table.observations))


@pytest.mark.parametrize("agent", ["td3_bc", "iql"])
def test_a_resumed_training_is_the_same_to_the_bit(make, tmp_path, agent):
    whole, part, continued = (make(agent, num_sets=2) for _ in range(3))
    for _ in range(7):
        part.update()
    save_checkpoint(tmp_path / "c", part.weights(), part.state_dict(), {})
    weights, state, _ = load_checkpoint(tmp_path / "c")
    continued.load(weights, state, "here")
    while whole.num_updates < 12:
        whole.update()
    while continued.num_updates < 12:
        continued.update()
    for name, tensor in whole.weights().items():
        assert torch.equal(tensor, continued.weights()[name]), name


def test_models_of_another_kind_or_task_are_refused(
    dataset_file, task, model, model_dir, ensemble_dir, tiny_train, tmp_path
):
    diffusion = load_diffusion(model_dir, "cpu")
    for data, given, message in (
        ("ensemble", None, "ensemble data need an ensemble, got no model"),
        ("ensemble", diffusion, "ensemble data need an ensemble, got a diffusion model"),
        ("guided", model, "guided data need a diffusion model, got an ensemble"),
    ):
        with pytest.raises(InputError, match=message):
            AgentTraining(task, tiny_train, "iql", data, 0, "cpu", given)
    other = dataclasses.replace(model, stored=model.stored | {"dataset_env_id": "Hopper-v5"})
    with pytest.raises(InputError, match="environment must be Hopper-v5, that of the ensemble's"):
        AgentTraining(task, tiny_train, "iql", "ensemble", 0, "cpu", other)
    with pytest.raises(CheckpointError, match="is a run of `offline diffuse`, wanted one of `offl"):
        load_ensemble(model_dir, "cpu")
    arguments = ("iql", "ensemble", str(dataset_file), tmp_path / "run", ensemble_dir)
    train_agent(*arguments, config=tiny_train, device="cpu")
    path = tmp_path / "run" / "config.json"
    stored = json.loads(path.read_text())
    stored["model_content"]["num_updates"] = 13
    path.write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match="model_content.num_updates of .* as the run began"):
        train_agent(*arguments, config=tiny_train, device="cpu", resume=True)


def test_presets_have_the_windows_of_what_they_are_compared_with():
    lengths = [DynamicsConfig.from_preset(name).window_length for name in ("released", "paper")]
    assert lengths == [32, 16]
    members = [DynamicsConfig.from_preset(name).ensemble.num_members for name in ("paper", "quick")]
    assert members == [7, 5]
