"""`PolyGRAD` with a denoiser and a policy of the user's: training, exact resume, errors."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import polygrad_fast as pg
from cases import tiny_config
from polygrad_fast import cli
from polygrad_fast.runs.metrics import read_metrics

S, A, H = 3, 1, 4  # Pendulum


class OwnDenoiser(nn.Module):
    """A recurrent one with running statistics, which the average takes over."""

    def __init__(self, observation_dim=S, action_dim=A, horizon=H, width=16):
        super().__init__()
        self.observation_dim, self.action_dim, self.horizon = observation_dim, action_dim, horizon
        self.norm = nn.BatchNorm1d(horizon)
        self.recurrent = nn.GRU(observation_dim + 3 + action_dim, width, batch_first=True)
        self.output = nn.Linear(width, observation_dim + 2)

    def forward(self, trajectory, actions, timesteps):
        step = timesteps.to(trajectory.dtype).view(-1, 1, 1).expand(-1, self.horizon, 1)
        hidden, _ = self.recurrent(torch.cat([self.norm(trajectory), actions, step], -1))
        return self.output(hidden)


class OwnPolicy(nn.Module):
    """Raw observations to mean and a standard deviation that depends on them."""

    def __init__(self, observation_dim=S, action_dim=A):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(observation_dim, 16), nn.Tanh())
        self.head = nn.Linear(16, 2 * action_dim)

    def forward(self, observations):
        mean, log_std = self.head(self.body(observations)).chunk(2, -1)
        return mean, 0.3 + log_std.exp()


def small_config(**overrides) -> pg.TrainConfig:
    return tiny_config(**({"horizon": H, "a2c__saturation_coef": 0.0} | overrides))


def own_modules(seed: int = 0) -> dict[str, nn.Module]:
    torch.manual_seed(seed)
    return {"denoiser": OwnDenoiser(), "policy": OwnPolicy()}


def comparable(path) -> list[dict[str, float]]:
    rows = read_metrics(path / "metrics.csv")
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


@pytest.mark.parametrize("engine", ["reference", "torch"])
def test_own_modules_are_trained(engine):
    own = own_modules()
    before = {
        name: [p.detach().clone() for p in module.parameters()] for name, module in own.items()
    }
    config = small_config(engine=engine)
    config = replace(config, denoiser=replace(config.denoiser, ema_interval=1))
    agent = pg.PolyGRAD("Pendulum-v1", config=config, **own)
    assert agent.policy is own["policy"] and agent.world_model.trainer.model is own["denoiser"]
    rows = []
    agent.learn(120, callback=lambda agent, metrics: rows.append(metrics))
    for name, module in own.items():
        assert not any(map(torch.equal, module.parameters(), before[name])), name
    assert np.isfinite(rows[-1]["a2c/actor_loss"]) and "a2c/policy_std" in rows[-1]
    assert not any("a2c/log_std_grad_norm" in row for row in rows)
    average = agent.denoiser
    assert not average.training and torch.equal(
        average.norm.running_mean, own["denoiser"].norm.running_mean
    )
    batch = agent.imagine(5)
    assert batch.observations.shape == (5, H, S) and torch.isfinite(batch.actions).all()
    assert agent.predict(np.zeros(S))[0].shape == (A,)


@pytest.mark.parametrize("given", [("denoiser",), ("policy",), ("denoiser", "policy")])
def test_resume_continues_exactly(tmp_path, given):
    def own(seed):
        return {name: module for name, module in own_modules(seed).items() if name in given}

    arguments = {"seed": 1, "config": small_config()}
    whole = pg.PolyGRAD("Pendulum-v1", **arguments, **own(0), run_dir=tmp_path / "whole")
    whole.learn(150)
    part = pg.PolyGRAD("Pendulum-v1", **arguments, **own(0), run_dir=tmp_path / "part")

    class Killed(Exception):
        pass

    def kill(agent, metrics):
        if agent.num_timesteps == 125:
            raise Killed

    with pytest.raises(Killed):
        part.learn(150, callback=kill)
    torch.manual_seed(99)
    resumed = pg.PolyGRAD.resume(tmp_path / "part", **own(7))  # other weights, overwritten
    assert resumed.num_timesteps in (100, 125)
    resumed.learn(150 - resumed.num_timesteps)
    assert comparable(tmp_path / "part") == comparable(tmp_path / "whole")
    for name, weight in whole.training.weights().items():
        assert torch.equal(weight, resumed.training.weights()[name]), name
    best = pg.PolyGRAD.load(tmp_path / "part", checkpoint="best", **own(8))
    observation = np.array([0.6, -0.8, 0.3])
    assert best.predict(observation, deterministic=True)[0].shape == (A,)


def test_save_and_load(tmp_path):
    agent = pg.PolyGRAD("Pendulum-v1", config=small_config(), **own_modules())
    agent.learn(80)
    agent.save(tmp_path / "saved")
    loaded = pg.PolyGRAD.load(tmp_path / "saved", **own_modules(5))
    for name, weight in agent.training.weights().items():
        assert torch.equal(weight, loaded.training.weights()[name]), name
    agent.learn(20)
    loaded.learn(20)
    for name, weight in agent.training.weights().items():
        assert torch.equal(weight, loaded.training.weights()[name]), name


def test_what_a_run_of_own_modules_needs(tmp_path, capsys):
    run_dir = tmp_path / "run"
    agent = pg.PolyGRAD("Pendulum-v1", config=small_config(), run_dir=run_dir, **own_modules())
    agent.learn(50)
    names = json.loads((run_dir / "config.json").read_text())["own_modules"]
    assert names["denoiser"].endswith(".OwnDenoiser") and names["policy"].endswith(".OwnPolicy")
    own = own_modules()
    for load in (pg.PolyGRAD.load, pg.PolyGRAD.resume):
        with pytest.raises(pg.InputError, match=r"own denoiser, .*OwnDenoiser.* as denoiser="):
            load(run_dir, policy=own["policy"])
        with pytest.raises(pg.InputError, match=r"own policy, .*OwnPolicy.* as policy="):
            load(run_dir, denoiser=own["denoiser"])
    with pytest.raises(pg.CheckpointError, match="denoiser is not of this configuration"):
        pg.PolyGRAD.load(run_dir, denoiser=OwnDenoiser(width=8), policy=own["policy"])
    for command in (
        ["evaluate", str(run_dir)],
        ["sample", str(run_dir), "--out", str(tmp_path / "out.npz")],
        ["train", "--resume", "--run-dir", str(run_dir)],
    ):
        assert cli.main(command) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and "own denoiser" in lines[0] and "OwnDenoiser" in lines[0]
    plain = pg.PolyGRAD("Pendulum-v1", config=small_config())
    plain.save(tmp_path / "plain")
    with pytest.raises(pg.InputError, match="built-in policy, got policy=OwnPolicy; wanted none"):
        pg.PolyGRAD.load(tmp_path / "plain", policy=own["policy"])


class Overwritten(OwnDenoiser):
    """Destroys what its backward pass needs."""

    def forward(self, trajectory, actions, timesteps):
        prediction = super().forward(trajectory, actions, timesteps).exp()
        prediction.detach().zero_()
        return prediction


class Detached(OwnPolicy):
    def forward(self, observations):
        return tuple(part.detach() for part in super().forward(observations))


class NoCopy(OwnDenoiser):
    def __deepcopy__(self, memo):
        raise TypeError("holds a socket")


@pytest.mark.parametrize(
    "own, message",
    [
        (
            {"denoiser": OwnDenoiser(horizon=5)},
            "OwnDenoiser: horizon must be the config's 4, got 5",
        ),
        (
            {"denoiser": OwnDenoiser(observation_dim=4)},
            "observation_dim must be the environment's 3, got 4",
        ),
        ({"denoiser": OwnDenoiser(action_dim=2)}, "action_dim must be the environment's 1, got 2"),
        ({"denoiser": OwnPolicy()}, "denoiser OwnPolicy must have the attribute observation_dim"),
        ({"denoiser": lambda x, u, k: x}, "denoiser must be a torch.nn.Module .*, got <lambda>"),
        ({"denoiser": NoCopy()}, "NoCopy cannot be copied for its average: holds a socket"),
        ({"policy": OwnPolicy(observation_dim=4)}, "policy OwnPolicy, called as .*, failed: mat1"),
        ({"policy": OwnPolicy(action_dim=2)}, r"a mean of shape \[1\], got \[2\]"),
        ({"policy": OwnDenoiser()}, "policy OwnDenoiser, called as .* failed"),
        ({"policy": lambda o: (o, o)}, "policy must be a torch.nn.Module .*, got <lambda>"),
        (
            {"denoiser": OwnDenoiser().double()},
            "must have its weights in torch.float32 .*, got .* in torch.float64",
        ),
        ({"denoiser": Overwritten()}, "Overwritten, .* differentiated with.*weights: .*inplace"),
        (
            {"policy": Detached()},
            "policy Detached, called as .* differentiated with .*weights: there",
        ),
    ],
)
def test_modules_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, own, message):
    with pytest.raises(pg.InputError, match=message):
        pg.PolyGRAD("Pendulum-v1", config=small_config(), run_dir=tmp_path / "run", **own)
    assert not (tmp_path / "run").exists()


def test_what_own_policies_lack_is_said():
    config = small_config(a2c=pg.A2CConfig(saturation_coef=0.1))
    with pytest.raises(
        pg.InputError, match="saturation_coef must be 0 for a policy without a module"
    ):
        pg.PolyGRAD("Pendulum-v1", config=config, policy=OwnPolicy())


def test_lora_in_the_built_in_policy_is_an_own_policy():
    """Adapted networks train, act and imagine as they are."""

    class LoRA(nn.Linear):
        def __init__(self, linear):
            super().__init__(linear.in_features, linear.out_features)
            self.load_state_dict(linear.state_dict())
            self.requires_grad_(False)
            self.down = nn.Parameter(0.1 * torch.randn(2, linear.in_features))
            self.up = nn.Parameter(torch.zeros(linear.out_features, 2))

        def forward(self, x):
            return super().forward(x) + x @ self.down.T @ self.up.T

    policy = pg.GaussianPolicy(S, A, 16)
    policy.network[3] = LoRA(policy.network[3])
    kept = policy.network[3].weight.clone()
    agent = pg.PolyGRAD("Pendulum-v1", config=small_config(), policy=policy)
    rows = []
    agent.learn(80, callback=lambda agent, metrics: rows.append(metrics))
    assert policy.network[3].up.abs().sum() > 0
    assert torch.equal(policy.network[3].weight, kept)
    assert rows[-1]["a2c/log_std_grad_norm"] > 0


class NormedPolicy(OwnPolicy):
    """Reads normalized observations, and knows no normalizer."""

    normed_inputs = True

    def forward(self, observations):
        raise NotImplementedError

    def distribution(self, inputs):
        return OwnPolicy.forward(self, inputs)


@pytest.mark.parametrize("kind", ["own", "GaussianPolicy"])
def test_a_policy_acts_on_what_it_is_trained_on(kind):
    """On the agent's moments, whatever normalizer it came with."""
    policy = NormedPolicy()
    if kind == "GaussianPolicy":
        options = {"normed_inputs": True, "normalizer": pg.Normalizer(S, A)}
        policy = pg.GaussianPolicy(S, A, 16, **options)
    agent = pg.PolyGRAD("Pendulum-v1", config=small_config(), policy=policy)
    agent.learn(80)
    observations = np.array([[0.6, -0.8, 3.0], [1.0, 0.0, -7.0]], dtype=np.float32)
    inputs = agent.normalizer.normalize(torch.from_numpy(observations), "observations")
    with torch.no_grad():
        mean, _ = policy.distribution(inputs)
    wanted = agent.action_scaler.to_environment(mean.numpy())
    got, _ = agent.predict(observations, deterministic=True)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    assert agent.evaluate(1).mean_reward < 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_policy_may_return_another_dtype(dtype):
    class Converting(OwnPolicy):
        def forward(self, observations):
            mean, std = super().forward(observations)
            return mean.to(dtype), std

    agent = pg.PolyGRAD("Pendulum-v1", config=small_config(), policy=Converting())
    agent.learn(60)
    for deterministic in (False, True):
        assert agent.predict(np.zeros(S), deterministic)[0].dtype == np.float32


def test_a_policy_may_overwrite_what_it_reads():
    class Overwriting(OwnPolicy):
        def forward(self, observations):
            mean, std = super().forward(observations.clone())
            with torch.no_grad():
                observations.fill_(1e6)
            return mean, std

    results = []
    for kind in (OwnPolicy, Overwriting):
        torch.manual_seed(0)
        agent = pg.PolyGRAD("Pendulum-v1", config=small_config(), policy=kind())
        agent.learn(80)
        results.append([p.detach().clone() for p in agent.policy.parameters()])
    assert all(map(torch.equal, *results))


def test_no_device_is_auto():
    agent = pg.PolyGRAD("Pendulum-v1", config=small_config(), device=None)
    assert agent.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(pg.InputError, match="device '1.5' cannot be used"):
        pg.PolyGRAD("Pendulum-v1", config=small_config(), device=1.5)
