"""The ensemble learns a noisy linear system: means and noise are known."""

from dataclasses import replace

import pytest
import torch

import polygrad_fast as pg
from linear_system import with_junk_after_ends
from polygrad_fast.config import EnsembleConfig
from polygrad_fast.data.replay import Windows
from polygrad_fast.denoisers.ensemble import EnsembleNetwork, is_held_out
from polygrad_fast.transitions import Transitions
from polygrad_fast.world_models.ensemble import Ensemble

S, A, H = 2, 1, 4
LOW, HIGH = -1.0, 1.0
MEAN, STD = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 0.5])
NOISE, REWARD_NOISE = torch.tensor([0.3, 0.05]), 0.4
ROWS = 12_000


def expected(observations, actions):
    """Means of o' and reward; terminal where o[1] is above 0."""
    clipped = actions.clamp(LOW, HIGH)
    moved = observations @ torch.tensor([[0.9, 0.1], [-0.2, 0.8]]).T
    moved = moved + clipped @ torch.tensor([[0.3, -0.1]])
    rewards = observations[..., 0] + 2 * clipped[..., 0]
    return moved, rewards, (observations[..., 1] > 0).float()


def make_transitions(number: int, seed: int) -> Transitions:
    g = torch.Generator().manual_seed(seed)
    observations = MEAN + STD * torch.randn(number, S, generator=g)
    actions = 1.5 * torch.randn(number, A, generator=g)
    moved, rewards, terminals = expected(observations, actions)
    moved = moved + NOISE * torch.randn(number, S, generator=g)
    rewards = rewards + REWARD_NOISE * torch.randn(number, generator=g)
    return Transitions.from_parts(observations, actions, rewards, moved, terminals)


def make_model(**options) -> Ensemble:
    torch.manual_seed(0)
    normalizer = pg.Normalizer.from_moments(
        observations=(MEAN, STD),
        actions=(torch.tensor([0.2]), torch.tensor([0.7])),
        rewards=(0.5, 3.0),
        terminals=(0.1, 0.3),
    )
    options = {"hidden_dim": 32, "num_layers": 2, "num_members": 4, "num_elites": 2} | options
    bounds = torch.tensor([LOW]), torch.tensor([HIGH])
    return Ensemble(EnsembleConfig(**options), H, normalizer, bounds, torch.device("cpu"))


@pytest.fixture(scope="module")
def trained() -> Ensemble:
    model, data = make_model(learning_rate=2e-3, ema_decay=0.98), make_transitions(ROWS, 0)
    g = torch.Generator().manual_seed(1)
    for _ in range(900):
        model.fit(data.sample(256, g), g)
    return model


def policy(observations):
    return 0.3 * observations[..., :1], torch.full_like(observations[..., :1], 0.8)


def test_mean_and_noise_of_the_system_are_recovered(trained):
    """From one state each, many draws: their mean is the system's, their spread its noise's."""
    g = torch.Generator().manual_seed(5)
    states = MEAN + STD * torch.randn(16, S, generator=g)
    states[:, 1] = states[:, 1].clamp(max=-0.4)  # none is terminal
    draws = 600
    batch = trained.imagine(states.repeat_interleave(draws, 0), policy, g, horizon=2)
    moved, rewards, _ = expected(batch.observations[:, 0], batch.actions[:, 0])
    assert not batch.terminals.any()
    errors = (batch.observations[:, 1] - moved).view(16, draws, S)
    assert (errors.mean(1).abs() < 0.15 * STD).all()
    assert torch.allclose(errors.std((0, 1)), NOISE, rtol=0.15)
    wrong = (batch.rewards[:, 0] - rewards).view(16, draws)
    assert (wrong.mean(1).abs() < 0.25).all()
    assert wrong.std().item() == pytest.approx(REWARD_NOISE, rel=0.15)


def test_terminals_are_the_systems_and_end_a_trajectory(trained):
    g = torch.Generator().manual_seed(6)
    s0 = MEAN + STD * torch.randn(512, S, generator=g)
    batch = trained.imagine(s0, policy, g)
    assert batch.observations.shape == (512, H, S) and batch.actions.shape == (512, H, A)
    assert torch.equal(batch.observations[:, 0], s0)
    clear = s0[:, 1].abs() > 0.2  # away from where the flag changes
    assert (batch.terminals[:, 0] == (s0[:, 1] > 0).float())[clear].float().mean() > 0.99
    assert (batch.terminals[:, 1:] >= batch.terminals[:, :-1]).all()
    stays = batch.terminals[:, :-1] == 1
    assert torch.equal(batch.observations[:, 1:][stays], batch.observations[:, :-1][stays])


def test_normalized_batches_are_the_same_trajectories(trained):
    s0 = MEAN + STD * torch.randn(64, S, generator=torch.Generator().manual_seed(7))
    normalizer = trained.normalizer
    raw = trained.imagine(s0, policy, torch.Generator().manual_seed(8))
    start = normalizer.normalize(s0, "observations")
    normed = trained.imagine(start, policy, torch.Generator().manual_seed(8), normalized=True)
    for name in ("observations", "actions", "rewards", "terminals"):
        back = normalizer.unnormalize(getattr(normed, name), name)
        assert torch.allclose(back, getattr(raw, name), atol=1e-5), name


def test_held_out_steps_are_a_fixed_share_and_train_nothing():
    data = make_transitions(20_000, 3)
    held_out = is_held_out(data.observations, data.actions, 0.1)
    assert held_out.float().mean().item() == pytest.approx(0.1, abs=0.01)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    again = is_held_out(data.observations[order], data.actions[order], 0.1)
    assert torch.equal(again, held_out[order])
    assert not is_held_out(data.observations, data.actions, 0.0).any()
    # and not by what they are worth
    assert (
        torch.corrcoef(torch.stack([held_out.float(), data.observations[:, 0]]))[0, 1].abs() < 0.03
    )

    rows = data.rows[:256].clone()
    first = Transitions(rows, S, A)
    own = is_held_out(first.observations, first.actions, 0.3)
    junk = rows.clone()
    junk[own, S + A] = 55.0  # rewards of held-out steps
    losses = [
        make_model(holdout_fraction=0.3).fit(Transitions(r, S, A), torch.Generator().manual_seed(0))
        for r in (rows, junk)
    ]
    for name in ("loss", "observation_loss", "reward_loss", "terminal_loss"):
        assert losses[0][f"dynamics/{name}"] == losses[1][f"dynamics/{name}"]
    assert losses[1]["dynamics/holdout_error"] > 10 * losses[0]["dynamics/holdout_error"]


def test_the_elites_are_the_members_with_the_least_held_out_error():
    model, data = make_model(num_members=5, num_elites=2), make_transitions(4000, 4)
    network = model.trainer.model
    with torch.no_grad():
        for member, size in enumerate((3.0, 0.1, 2.0, 0.0, 1.0)):  # of wrong predictions
            network.biases[-1][member].add_(size)
    for _ in range(3):
        model.fit(data.sample(512, torch.Generator().manual_seed(0)))
    assert set(network.elites.tolist()) == {1, 3}
    assert torch.equal(model.network.elites.sort().values, network.elites.sort().values)


def test_each_elite_imagines_an_equal_share_and_no_other_member():
    network = EnsembleNetwork(S, A, 5, 3, 8, 1)
    with torch.no_grad():
        network.held_out_errors.copy_(torch.tensor([0.3, 9.0, 0.1, 9.0, 0.2]))
        network.difference_scale.fill_(1.0)
        network.weights[-1].zero_()
        network.min_log_variance.fill_(-60.0)
        for member, bias in enumerate(network.biases[-1]):
            bias.fill_(0.0)
            bias[..., : S + 1] = float(member)  # what it predicts
            bias[..., S + 1 : -1] = -50.0  # without noise
    rows, g = 30, torch.Generator().manual_seed(0)
    seen = []
    for _ in range(40):
        moved, rewards, _ = network.draw(torch.zeros(rows, S), torch.zeros(rows, A), g)
        assert torch.allclose(moved[:, 0], rewards, atol=1e-4)
        member = rewards.round().long()
        assert torch.bincount(member, minlength=5).tolist() == [10, 0, 10, 0, 10]
        seen.append(member)
    assert torch.bincount(torch.stack(seen)[:, 0]).tolist()[4] > 5  # a row's own changes
    assert network.draw(torch.zeros(1, S), torch.zeros(1, A), g)[0].shape == (1, S)


def test_members_train_on_bootstraps_of_the_batch():
    model = make_model()
    counts = model._bootstrap(500, torch.device("cpu"), torch.Generator().manual_seed(0))
    assert counts.shape == (4, 500) and (counts.sum(1) == 500).all()
    assert (counts == 0).float().mean().item() == pytest.approx(0.368, abs=0.03)
    assert not torch.equal(counts[0], counts[1])


def test_windows_and_their_transitions_train_the_same():
    """What follows a window's last step is not in it, and what follows a terminal does not
    count."""
    g = torch.Generator().manual_seed(2)
    observations = MEAN + STD * torch.randn(32, H, S, generator=g)
    terminals = torch.zeros(32, H)
    terminals[:16, 2:] = 1.0
    windows = Windows(
        observations, torch.randn(32, H, A, generator=g), torch.randn(32, H, generator=g), terminals
    )
    options = {"holdout_fraction": 0.0, "num_elites": 4}
    losses = make_model(**options).update(windows, torch.Generator().manual_seed(0))
    changed, ended = with_junk_after_ends(windows)
    assert make_model(**options).update(changed, torch.Generator().manual_seed(0)) == losses
    alive = replace(windows, rewards=windows.rewards.masked_fill(~ended, 55.0))
    other = make_model(**options).update(alive, torch.Generator().manual_seed(0))
    assert other["dynamics/reward_loss"] > losses["dynamics/reward_loss"]


def test_log_variances_stay_within_the_learned_bounds():
    network = EnsembleNetwork(S, A, 2, 1, 8, 1)
    with torch.no_grad():
        for value in (80.0, -80.0):
            network.biases[-1].fill_(value)
            found = network(torch.randn(9, S), torch.randn(9, A)).log_variance
            assert (found >= network.min_log_variance).all()
            assert (found <= network.max_log_variance + 1e-4).all()


def test_training_continues_exactly_from_a_saved_state():
    data = make_transitions(2000, 0)

    def train(model, first, stop):
        for seed in range(first, stop):
            g = torch.Generator().manual_seed(seed)
            model.fit(data.sample(64, g), g)

    whole, part, resumed = make_model(), make_model(), make_model()
    train(whole, 0, 20)
    train(part, 0, 10)
    for name, module in part.modules().items():
        resumed.modules()[name].load_state_dict(module.state_dict())
    resumed.load_state_dict(part.state_dict())
    train(resumed, 10, 20)
    for name, module in whole.modules().items():
        for key, tensor in module.state_dict().items():
            assert torch.equal(tensor, resumed.modules()[name].state_dict()[key]), (name, key)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_elites": 8}, "num_elites must be at most num_members, 7, got 8"),
        ({"holdout_fraction": 0.0}, r"holdout_fraction must be in \(0, 1\) to choose elites, got"),
        ({"holdout_decay": 1.0}, r"holdout_decay must be in \[0, 1\), got 1.0"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(pg.InputError, match=message):
        EnsembleConfig(**options)
