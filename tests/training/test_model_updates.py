"""Updates of world models in CUDA graphs, on an imitated device and on a real one."""

import numpy as np
import pytest
import torch

import polygrad_fast as pg
from cases import tiny_config
from polygrad_fast.config import AutoregressiveConfig, DenoiserConfig, ScheduleConfig
from polygrad_fast.data import ReplayBuffer
from polygrad_fast.runs.metric_sums import MetricSums
from polygrad_fast.training.model_updates import EAGER_UPDATES, UPDATES_PER_REPLAY, ModelUpdates
from polygrad_fast.world_models import build_world_model

S, A, H, BATCH, K = 3, 2, 4, 7, 5
AVERAGING = {"ema_interval": 2, "ema_decay": 0.8}
MODELS = {
    "residual_mlp": {"denoiser": DenoiserConfig(hidden_dim=16, num_layers=2, **AVERAGING)},
    "layer": {
        "denoiser": DenoiserConfig(
            hidden_dim=16, num_layers=2, step_conditioning="layer", ema_start=6, **AVERAGING
        )
    },
    "transformer": {
        "denoiser": DenoiserConfig(
            kind="transformer", hidden_dim=16, num_layers=1, num_heads=2, **AVERAGING
        )
    },
    "rollout": {
        "denoiser": DenoiserConfig(kind="rollout", hidden_dim=16, num_layers=2, **AVERAGING),
        "sampler": pg.SamplerConfig.official(scale_actions=False),
    },
    "autoregressive": {
        "world_model": "autoregressive",
        "autoregressive": AutoregressiveConfig(hidden_dim=16, num_layers=2, **AVERAGING),
    },
}
cases = pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)


def add_episode(replay, rng, length=9):
    for t in range(length):
        replay.add(rng.normal(size=S), rng.normal(size=A), rng.normal(), t == length - 1, False)


def build(device, options, seed=0):
    """Return updates of a model on a replay buffer with two episodes, the model and the sums."""
    torch.manual_seed(0)
    config = pg.TrainConfig(horizon=H, schedule=ScheduleConfig(num_train_timesteps=K), **options)
    replay = ReplayBuffer(40, H, S, A, device)
    rng = np.random.default_rng(0)
    add_episode(replay, rng), add_episode(replay, rng)
    normalizer = pg.Normalizer(S, A).to(device)
    bounds = np.full(A, -1, np.float32), np.full(A, 1, np.float32)
    model = build_world_model(config.resolved(""), normalizer, bounds, torch.device(device))
    sums, generator = MetricSums(), torch.Generator(device).manual_seed(seed)
    updates = ModelUpdates(model, replay, BATCH, generator, sums)
    return updates, model, sums, replay


def assert_same_model(got, wanted, atol=2e-5):
    trainers = got.trainer, wanted.trainer
    assert trainers[0].num_updates == trainers[1].num_updates
    for name in ("model", "ema_model"):
        pairs = zip(*(getattr(t, name).state_dict().values() for t in trainers), strict=True)
        for mine, theirs in pairs:
            # where a gradient is nothing but rounding, Adam makes a step of it
            assert (mine.cpu() - theirs.cpu()).abs().mean() < atol
            assert torch.isfinite(mine).all()


@cases
def test_replays_take_the_updates_of_a_cpu(gpu, options):
    """Also after steps have been added, and with several in one replay."""
    if gpu is None:
        pytest.skip("a GPU draws other numbers than a CPU")
    rng = np.random.default_rng(5)
    (on_gpu, model, sums, replay), (on_cpu, wanted, wanted_sums, other) = (
        build(device, options) for device in ("cuda", "cpu")
    )
    for update in range(12):
        for one in (on_gpu, on_cpu):
            one.take(one.at_once(1))
        if update % 4 == 3:
            episode = rng.spawn(1)[0].bit_generator.state
            for buffer in (replay, other):
                r = np.random.default_rng()
                r.bit_generator.state = episode
                add_episode(buffer, r)
    assert_same_model(model, wanted)
    got, means = sums.means(), wanted_sums.means()
    assert got.keys() == means.keys()
    for name, value in means.items():
        assert got[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert 1 <= len(gpu.graphs) <= 3  # without averaging, with it, overwriting


@cases
def test_an_update_is_one_replay_and_the_host_does_not_wait(gpu, options):
    if gpu is None:
        pytest.skip("launches are counted on the imitated device")
    updates, model, _, _ = build("cuda", options)
    for _ in range(EAGER_UPDATES + 12):
        updates.take(updates.at_once(1))
    before = model.trainer.num_updates
    with gpu.without_syncs() as launches:
        for _ in range(4):
            updates.take(updates.at_once(1))
    assert launches["graph replay"] == 4
    assert launches.total() <= 4 * 14
    assert model.trainer.num_updates == before + 4


@cases
def test_graphs_learn_what_eager_updates_learn(gpu, options, monkeypatch):
    """Ten at once, and one by one, from the same random numbers."""
    (captured, model, sums, _), (eager, wanted, eager_sums, _) = (
        build("cuda", options) for _ in range(2)
    )
    monkeypatch.setattr(eager, "_is_ready", lambda: False)
    for one in (captured, eager):
        for _ in range(EAGER_UPDATES):
            one.take(1)
    assert captured.at_once(UPDATES_PER_REPLAY - 1) == 1
    assert captured.at_once(UPDATES_PER_REPLAY + 3) == UPDATES_PER_REPLAY
    for count in (UPDATES_PER_REPLAY, 1, 1, 1, UPDATES_PER_REPLAY):
        for one in (captured, eager):
            one.take(count)
    assert_same_model(model, wanted)
    for name, value in eager_sums.means().items():
        assert sums.means()[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    if gpu is not None:
        replayed = {len(places) for (places,) in ((g.inputs) for g in entries(captured))}
        assert replayed == {1, UPDATES_PER_REPLAY}


def entries(updates):
    return list(updates._graphs._entries.values())


def test_watched_networks_stay_eager_and_graphs_are_forgotten_with_what_they_change(gpu):
    updates, model, _, _ = build("cuda", MODELS["residual_mlp"])
    for _ in range(EAGER_UPDATES + 2):
        updates.take(1)
    assert entries(updates)
    handle = model.trainer.model.output.register_forward_hook(lambda *_: seen.append(1))
    seen = []
    updates.take(updates.at_once(UPDATES_PER_REPLAY))
    assert len(seen) == 1
    handle.remove()
    updates.reset()
    assert not entries(updates)
    updates.take(1)
    assert not entries(updates), "eager again, for the new tensors"


def test_an_agents_updates_are_replays(gpu):
    options = dict(engine="torch", dtype="float32", policy_delay_steps=1000)  # no policy updates
    config = tiny_config(denoiser__pretrain_updates=25, **options)
    agent = pg.PolyGRAD("Pendulum-v1", device="cuda", config=config)
    rows = []
    agent.learn(60, callback=lambda _, row: rows.append(row))
    assert agent.world_model.trainer.num_updates == 25 + 10
    assert np.isfinite(rows[-1]["denoiser/loss"])
    sizes = {len(entry.inputs[0]) for entry in entries(agent.training._model_updates)}
    assert sizes == {1, UPDATES_PER_REPLAY}
