"""What is imagined stays within what the data have shown, however wrong the network."""

import itertools

import pytest
import torch

import polygrad_fast as pg
from cases import changed, tiny_config
from linear_system import (
    HIGH,
    LOW,
    H,
    S,
    make_normalizer,
    make_windows,
    policy,
    with_junk_after_ends,
)
from polygrad_fast.config import (
    AutoregressiveConfig,
    AutoregressiveDiffusionConfig,
    EnsembleConfig,
    TransformerModelConfig,
)
from polygrad_fast.denoisers.shown_range import ShownRange, shown_ranges
from polygrad_fast.world_models import (
    Autoregressive,
    AutoregressiveDiffusion,
    Ensemble,
    Transformer,
)

BUILT = {
    "autoregressive": (Autoregressive, AutoregressiveConfig(hidden_dim=16)),
    "ensemble": (Ensemble, EnsembleConfig(hidden_dim=16, num_layers=2)),
    "transformer": (Transformer, TransformerModelConfig(hidden_dim=16, num_layers=1)),
    "diffusion": (AutoregressiveDiffusion, AutoregressiveDiffusionConfig(hidden_dim=16)),
}


def make_model(name):
    torch.manual_seed(0)
    built, config = BUILT[name]
    bounds = torch.tensor([LOW]), torch.tensor([HIGH])
    return built(config, H, make_normalizer(), bounds, torch.device("cpu"))


def shown(windows, normalizer):
    """Smallest and largest normalized observation and reward of the windows' real steps."""
    states = normalizer.normalize_trajectory(
        windows.observations, windows.rewards, windows.terminals
    )[..., :-1]
    real = states[windows.terminals.cumsum(1) <= 1]
    return real.amin(0), real.amax(0)


@pytest.mark.parametrize("name", BUILT)
def test_the_range_of_the_windows_is_noted_and_only_widens(name):
    model, normalizer = make_model(name), make_normalizer()
    low = torch.full((S + 1,), torch.inf)
    high = -low
    for seed in range(3):
        windows = make_windows(16, seed)
        model.update(windows, torch.Generator().manual_seed(0))
        least, most = shown(windows, normalizer)
        low, high = low.minimum(least), high.maximum(most)
        for network in model.modules().values():
            torch.testing.assert_close(network.range.lowest, low)
            torch.testing.assert_close(network.range.highest, high)


@pytest.mark.parametrize("name", BUILT)
def test_what_follows_a_terminal_step_shows_nothing(name):
    windows = make_windows(64, 0)
    junk, _ = with_junk_after_ends(windows)
    model = make_model(name)
    model.update(junk, torch.Generator().manual_seed(0))
    _, most = shown(windows, make_normalizer())
    torch.testing.assert_close(model.trainer.ema_model.range.highest, most)


@pytest.mark.parametrize("name", BUILT)
def test_a_model_that_diverges_is_held_back(name):
    model = make_model(name)
    windows = make_windows(64, 0)
    model.update(windows, torch.Generator().manual_seed(0))
    network = model.trainer.ema_model
    with torch.no_grad():
        network.difference_scale.fill_(1e4)
        for parameter in network.parameters():
            parameter.mul_(3.0)
    g = torch.Generator().manual_seed(1)
    batch = model.imagine(windows.observations[:, 0], policy, g)
    low, high = (bound[:-1] for bound in shown(windows, make_normalizer()))
    found = make_normalizer().normalize(batch.observations, "observations")
    assert (found >= low - 1e-4).all() and (found <= high + 1e-4).all()
    assert ((found - low).abs() < 1e-4).any() or ((found - high).abs() < 1e-4).any()
    low, high = windows.rewards.min(), windows.rewards.max()
    assert (batch.rewards >= low - 1e-4).all() and (batch.rewards <= high + 1e-4).all()


def test_without_windows_there_are_no_bounds():
    shown_range = ShownRange(S)
    observations, rewards = 1e20 * torch.randn(4, S), -1e20 * torch.ones(4)
    kept, paid = shown_range.clamp(observations, rewards)
    assert torch.equal(kept, observations) and torch.equal(paid, rewards)
    assert all(part.all() for part in shown_range.inside(observations, rewards))


def test_nan_is_not_hidden():
    shown_range = ShownRange(1)
    shown_range.note(torch.tensor([[0.0], [1.0]]), torch.tensor([0.0, 1.0]), torch.ones(2))
    kept, paid = shown_range.clamp(torch.tensor([[torch.nan]]), torch.tensor([torch.nan]))
    assert kept.isnan().all() and paid.isnan().all()


def test_bounds_stay_where_they_are_when_moments_change():
    before, after = make_normalizer(), make_normalizer()
    after.update(
        {
            "observations": (torch.tensor([1.5, 0.0]), torch.tensor([4.0, 0.1])),
            "rewards": (torch.tensor(-2.0), torch.tensor(7.0)),
        }
    )
    bounds, unknown = ShownRange(S), ShownRange(S)
    bounds.lowest.copy_(torch.tensor([-2.0, -3.0, -1.0]))
    bounds.highest.copy_(torch.tensor([1.0, 2.0, 4.0]))

    def raw(normalizer, bound):
        observations = normalizer.unnormalize(bound[:-1], "observations")
        return torch.cat([observations, normalizer.unnormalize(bound[-1:], "rewards")])

    wanted = [raw(before, bound) for bound in (bounds.lowest, bounds.highest)]
    (mean, scale), (mean_now, scale_now) = before.state_moments(), after.state_moments()
    for kept in (bounds, unknown):
        kept.keep_raw((mean_now - mean) / scale, scale_now / scale)
    for bound, where in zip((bounds.lowest, bounds.highest), wanted, strict=True):
        torch.testing.assert_close(raw(after, bound), where)
    assert torch.equal(unknown.highest, ShownRange(S).highest)


@pytest.mark.parametrize("name", ["autoregressive", "trajectory_diffusion"])
def test_an_agents_bounds_follow_its_moments(name):
    """In raw numbers they only widen, although moments change after every episode."""
    config = tiny_config(
        world_model=name,
        schedule__num_train_timesteps=5,
        sampler=pg.SamplerConfig.official(scale_actions=False),
        normalizer__refresh="episode",
    )
    config = changed(config, denoiser__kind="rollout")
    agent = pg.PolyGRAD("Pendulum-v1", device="cpu", config=config)
    (bounds, *_) = shown_ranges(agent.world_model.modules().values())
    seen = []
    for steps in range(250, 1050, 200):
        agent.learn(steps)
        mean, scale = agent.normalizer.state_moments()
        seen.append((mean.clone(), bounds.lowest * scale + mean, bounds.highest * scale + mean))
    for (was, low, high), (now, lower, higher) in itertools.pairwise(seen):
        assert not torch.equal(was, now)
        slack = 1e-4 * (high - low)
        assert (lower <= low + slack).all() and (higher >= high - slack).all()
    shown = torch.cat([agent.replay.initial_observations()]).aminmax(dim=0)
    *_, (_, low, high) = seen
    assert (low[:-1] >= shown.min - 0.5).all() and (high[:-1] <= shown.max + 0.5).all()


def test_a_checkpoint_without_bounds_is_one_before_the_first_window():
    model = make_model("autoregressive")
    network = model.trainer.model
    older = {k: v for k, v in network.state_dict().items() if not k.startswith("range.")}
    network.load_state_dict(older)
    assert torch.equal(network.range.highest, ShownRange(S).highest)
    with pytest.raises(RuntimeError, match="difference_scale"):
        network.load_state_dict({k: v for k, v in older.items() if k != "difference_scale"})


@pytest.mark.parametrize("process_noise", [False, True])
@pytest.mark.parametrize("name", ["autoregressive", "trajectory_diffusion"])
def test_what_is_cut_off_has_no_slope(name, process_noise):
    """Of what is imagined, by finite differences through `imagine`, where some of it is bounded."""
    sizes = {"autoregressive__hidden_dim": 16, "denoiser__hidden_dim": 16, "dtype": "float32"}
    noise = {f"{part}__process_noise": process_noise for part in ("autoregressive", "denoiser")}
    config = changed(pg.TrainConfig.from_preset("laptop"), world_model=name, **sizes, **noise)
    agent = pg.PolyGRAD("Pendulum-v1", device="cpu", config=config)
    model = agent.world_model
    network = model.trainer.ema_model
    network = getattr(network, "step", network)
    network.difference_scale.fill_(0.3)
    network.network[-1].bias.data[-1] = -14.0  # nothing ends
    bound = torch.tensor([0.4, 0.5, 0.6, 10.0])
    network.range.lowest.copy_(-bound)
    network.range.highest.copy_(bound)
    if process_noise:
        network.residual_squares.fill_(0.5)
        network.residual_weight.fill_(1.0)
    g = torch.Generator().manual_seed(0)
    starts, slope = torch.randn(32, 3, generator=g), torch.randn(32, 3, generator=g)

    def still(observation):  # a policy that does not react
        mean = torch.full_like(observation[..., :1], 0.3)
        return mean, torch.full_like(mean, 1e-9)

    def imagined(observations):
        batch = model.imagine(
            observations, still, torch.Generator().manual_seed(1), normalized=True
        )
        return batch.observations[:, 1], batch.rewards[:, 0]

    following, rewards = imagined(starts)
    assert (following.abs() <= bound[:-1] + 1e-6).all()
    outside = following.abs() > bound[:-1] - 1e-6
    actions = torch.full((32, 1), 0.3)
    zeros = torch.zeros(32)
    linearized = model.dynamics().linearize(starts, actions, following, rewards)
    found, _ = linearized.pull_back(slice(0, 32), slope, zeros, zeros)
    wanted, rows = [], torch.ones(32, dtype=torch.bool)
    for e in 1e-2 * torch.eye(3):
        ends = [imagined(starts + sign * e)[0] for sign in (1, -1)]
        wanted.append(((ends[0] - ends[1]) / 2e-2 * slope).sum(-1))
        for end in ends:  # no step over a bound
            rows &= ((end.abs() > bound[:-1] - 1e-6) == outside).all(-1)
    wanted = torch.stack(wanted, -1)
    assert rows.sum() > 10 and outside[rows].any() and (~outside[rows]).any()
    torch.testing.assert_close(found[rows], wanted[rows], rtol=0.02, atol=5e-3)
