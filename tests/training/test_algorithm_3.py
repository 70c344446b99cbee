"""What Algorithm 3 computes, followed by hand through an environment whose every number says where
it comes from: from acting over replay, denoiser, imagination and A2C to delta and the evaluation.

The tests look in at the seams between the parts (the environment, and the calls of
`DenoiserTrainer.update`, `PolicyGuidedSampler.sample` and `ActorCritic.update`), so they do not
depend on how the loop between them is written.
"""

import copy
import dataclasses
import inspect
import itertools
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch

import polygrad_fast as pg
from cases import tiny_config
from polygrad_fast.diagnostics.on_policy import on_policy_statistics
from polygrad_fast.diffusion.ddpm import denoising_loss
from polygrad_fast.diffusion.trainer import DenoiserTrainer

LOW, HIGH = np.array([-2.0, 0.0]), np.array([5.0, 1.0])
ENDS = ((4, "terminated"), (3, "truncated"), (5, "terminated"), (6, "truncated"), (2, "both"))
"""Length and end of the episodes, over and over: the first end after 4, 7, 12, 18 and 20 steps."""
H = 3


class Line(gymnasium.Env):
    """Observation (t, number of the episode); reward 10 t + first action + second action / 10.

    Args:
        scores: instead, the return of each episode, paid at its end.

    Attributes:
        steps: one dictionary per step taken; `observation` is the one before the step.
        seeds: of the resets.
    """

    def __init__(self, scores: tuple[float, ...] | None = None):
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,))
        self.action_space = gymnasium.spaces.Box(LOW.astype("f4"), HIGH.astype("f4"))
        self.scores, self.steps, self.seeds = scores, [], []

    def reset(self, *, seed=None, options=None):
        self.t = 0
        self.seeds.append(seed)
        return self._observation(), {}

    def step(self, action):
        before = self._observation()
        length, end = ENDS[(len(self.seeds) - 1) % len(ENDS)]
        self.t += 1
        over = self.t == length
        reward = 10.0 * before[0] + action[0] + action[1] / 10
        if self.scores is not None:
            reward = self.scores[len(self.seeds) - 1] if over else 0.0
        terminated, truncated = over and end != "truncated", over and end != "terminated"
        self.steps.append(dict(observation=before, action=np.array(action), reward=reward))
        return self._observation(), reward, terminated, truncated, {}

    def _observation(self):
        return np.array([self.t, len(self.seeds) - 1], dtype=np.float32)

    def column(self, name: str) -> np.ndarray:
        """One entry of every step taken."""
        return np.array([step[name] for step in self.steps])


def make_config(**options) -> pg.TrainConfig:
    """A configuration that takes milliseconds; options of a group are given as a dictionary."""
    config = pg.TrainConfig.from_preset("default")
    small = dict(
        horizon=H,
        schedule=dict(num_train_timesteps=4, tau=0.5),
        denoiser=dict(hidden_dim=16, num_layers=1, batch_size=32, learning_rate=1e-2),
        policy=dict(hidden_dim=8, init_std=0.5),
        imagined_batch_size=16,
        policy_updates_per_env_step=1.0,
        learning_starts=10,
        policy_delay_steps=0,
        replay_capacity=1000,
        eval_interval=10**6,
        eval_episodes=1,
        log_interval=10**6,
        checkpoint_interval=10**6,
        engine="reference",
    )
    for name, value in itertools.chain(small.items(), options.items()):
        if isinstance(value, dict):
            value = dataclasses.replace(getattr(config, name), **value)
        config = dataclasses.replace(config, **{name: value})
    return config


def make_agent(run_dir=None, scores=None, **options) -> tuple[pg.PolyGRAD, list[Line]]:
    """The agent, and its environments: the first is trained on, the others are evaluated on."""
    made = []

    def make() -> Line:
        made.append(Line(scores if made else None))
        return made[-1]

    config = make_config(**options)
    return pg.PolyGRAD(make, seed=3, config=config, run_dir=run_dir, device="cpu"), made


def spy(monkeypatch, cls, name, instead=None, note=None) -> list[SimpleNamespace]:
    """Record every call of a method: arguments (as they are at the call), `result`, and as `note`
    what the function of that name returns after the call."""
    real = getattr(cls, name)
    signature = inspect.signature(real)
    calls = []

    def as_it_is(value):
        if isinstance(value, torch.Generator):
            return torch.Generator().set_state(value.get_state())
        return value.clone() if isinstance(value, torch.Tensor) else value

    def recorded(self, *args, **kwargs):
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        call = SimpleNamespace(**{n: as_it_is(v) for n, v in bound.arguments.items()})
        call.result = (instead or real)(self, *args, **kwargs)
        call.note = note(self) if note is not None else None
        calls.append(call)
        return call.result

    monkeypatch.setattr(cls, name, recorded)
    return calls


def replay_rows(agent) -> np.ndarray:
    """What is stored, oldest first: observation [2], action [2], reward, terminal flag."""
    return agent.replay.state_dict()["steps"].double().numpy()


def moments(rows: np.ndarray, floors: dict[int, float] | None = None):
    """Mean and scale (population deviation + 1e-6) of every column of `replay_rows`."""
    deviations = rows.std(axis=0)
    for column, floor in (floors or {}).items():
        deviations[column] = max(deviations[column], floor)
    return rows.mean(axis=0), deviations + 1e-6


def to_environment(actions: np.ndarray) -> np.ndarray:
    return LOW + (np.clip(actions, -1, 1) + 1) / 2 * (HIGH - LOW)


def spread_out(policy) -> None:
    """Let the policy's mean depend on t, strongly."""
    generator = torch.Generator().manual_seed(0)
    first, *_, last = (m for m in policy.network if isinstance(m, torch.nn.Linear))
    with torch.no_grad():
        first.weight.normal_(generator=generator)
        first.weight[:, 1] = 0.0
        first.bias.normal_(generator=generator).sub_(2.0 * first.weight[:, 0])
        last.weight.normal_(generator=generator)


@torch.no_grad()
def policy_at(policy, observations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean, std = policy(torch.as_tensor(observations, dtype=torch.float32))
    return mean.double().numpy(), std.double().numpy()


# Acting and replay


@pytest.mark.parametrize("rescale", [True, False])
def test_prefill_draws_from_the_action_space_and_stores_the_policys_units(rescale):
    agent, (env, *_) = make_agent(learning_starts=50, rescale_actions=rescale)
    space = copy.deepcopy(env.action_space)
    agent.learn(55)
    drawn = np.array([space.sample() for _ in range(55)], dtype=np.float64)
    assert env.column("action")[:50] == pytest.approx(drawn[:50], abs=1e-5)
    wanted = 2 * (drawn - LOW) / (HIGH - LOW) - 1 if rescale else drawn
    assert replay_rows(agent)[:50, 2:4] == pytest.approx(wanted[:50], abs=1e-5)
    assert (np.abs(env.column("action") - drawn)[50:] > 1e-3).all()  # the policy's


def test_a_step_is_stored_with_its_own_observation_reward_and_terminal_flag():
    agent, (env, *_) = make_agent()
    agent.learn(45)
    observations, terminals = [], []
    for episode, (length, end) in enumerate(itertools.islice(itertools.cycle(ENDS), 12)):
        observations += [(t, episode) for t in range(length)]
        terminals += [0] * (length - 1) + [int(end != "truncated")]
    rows = replay_rows(agent)
    assert np.array_equal(rows[:, :2], observations[:45])
    assert rows[:, 4] == pytest.approx(env.column("reward"))
    assert np.array_equal(rows[:, 5], terminals[:45])
    assert agent.replay.num_episodes == 11  # the truncated ones too


def test_only_the_newest_steps_are_kept_and_imagined_from():
    agent, (env, *_) = make_agent(replay_capacity=20)
    agent.learn(50)
    kept = env.column("observation")[-20:]
    assert np.array_equal(replay_rows(agent)[:, :2], kept)
    starts = agent.imagine(300).observations[:, 0]
    assert {tuple(row) for row in starts.tolist()} <= {tuple(row) for row in kept.tolist()}


def test_an_episode_that_cannot_be_restored_ends_in_the_replay_buffer(tmp_path):
    agent, _ = make_agent()
    agent.learn(14)  # two steps into an episode of six
    agent.save(tmp_path / "saved")
    loaded = pg.PolyGRAD.load(tmp_path / "saved", env=Line, device="cpu")
    windows = loaded.replay.num_windows
    # the number of the episode is the environment's memory, so that a new one starts
    with pytest.warns(UserWarning, match="not deterministic"):
        loaded.learn(2)
    assert agent.replay.num_episodes == 3 and loaded.replay.num_episodes == 4
    assert loaded.replay.num_windows == windows  # two steps are no window, whatever came before
    loaded.learn(1)
    assert loaded.replay.num_windows == windows + 1


def acting_only(**options):
    """An agent that acts on 400 observations after the prefill and learns nothing."""
    agent, (env, *_) = make_agent(
        denoiser=dict(updates_per_env_step=0.0), policy_updates_per_env_step=0.0, **options
    )
    spread_out(agent.policy)
    agent.learn(410)
    return agent, env, replay_rows(agent)[10:]


def test_actions_after_the_prefill_are_drawn_from_the_policy_at_the_observation():
    agent, env, rows = acting_only()
    mean, std = policy_at(agent.policy, rows[:, :2])
    assert (mean.std(axis=0) > 0.3).all() and std == pytest.approx(0.5)
    normals = (rows[:, 2:4] - mean) / std
    assert normals.mean(axis=0) == pytest.approx(0.0, abs=4 / 20)
    assert normals.std(axis=0) == pytest.approx(1.0, abs=4 / 28)
    assert abs(np.corrcoef(normals.T)[0, 1]) < 4 / 20
    assert (np.abs(rows[:, 2:4]) > 1).any(axis=0).all()  # stored as drawn
    assert env.column("action")[10:] == pytest.approx(to_environment(rows[:, 2:4]), abs=1e-5)


def test_actions_are_stored_clipped_where_the_denoiser_is_to_see_clipped_ones():
    raw = acting_only()[2][:, 2:4]
    _, env, rows = acting_only(sampler=dict(denoiser_actions="clipped"))
    assert rows[:, 2:4] == pytest.approx(np.clip(raw, -1, 1))
    assert env.column("action")[10:] == pytest.approx(to_environment(raw), abs=1e-5)


def test_without_rescaling_the_policy_speaks_the_environments_units():
    _, env, raw = acting_only(rescale_actions=False)
    assert (raw[:, 3] < 0).any()
    assert env.column("action")[10:] == pytest.approx(np.clip(raw[:, 2:4], LOW, HIGH), abs=1e-5)
    _, _, rows = acting_only(rescale_actions=False, sampler=dict(denoiser_actions="clipped"))
    assert rows[:, 2:4] == pytest.approx(np.clip(raw[:, 2:4], LOW, HIGH))


@pytest.mark.parametrize("normed_inputs", [True, False])
def test_policy_and_critic_are_the_configured_ones(normed_inputs):
    options = dict(hidden_dim=12, num_layers=1, init_std=0.7, min_std=0.2)
    agent, _ = make_agent(policy=dict(normed_inputs=normed_inputs, **options))
    agent.learn(10)
    own = pg.GaussianPolicy(2, 2, 12, 1, 0.7, 0.2, normed_inputs, agent.normalizer)
    own.load_state_dict(agent.policy.state_dict())
    observations = replay_rows(agent)[:, :2]
    for got, wanted in zip(
        policy_at(agent.policy, observations), policy_at(own, observations), strict=True
    ):
        assert got == pytest.approx(wanted)
    pg.ValueFunction(2, 12, 1).load_state_dict(agent.training.learner.value_function.state_dict())


# The denoiser


@pytest.mark.parametrize(
    "refresh, refreshed_at", [("prefill", (10,)), ("episode", (10, 12, 18, 20, 24, 27, 32))]
)
def test_the_denoiser_trains_on_normalized_windows(refresh, refreshed_at, monkeypatch):
    agent, (env, *_) = make_agent(
        denoiser=dict(pretrain_updates=2, batch_size=64),
        normalizer=dict(
            refresh=refresh,
            min_std_observations=2.0,
            min_std_actions=1.5,
            min_std_rewards=30.0,
            min_std_terminals=0.9,
        ),
    )
    updates = spy(monkeypatch, DenoiserTrainer, "update", note=lambda _: len(env.steps))
    agent.learn(34)
    assert [update.note for update in updates] == [10, 10, *range(11, 35)]
    rows = replay_rows(agent)
    floors = {0: 2.0, 1: 2.0, 2: 1.5, 3: 1.5, 4: 30.0, 5: 0.9}
    starts_seen = set()
    for update in updates:
        refreshed = max(step for step in refreshed_at if step <= update.note)
        mean, scale = moments(rows[:refreshed], floors)
        batch = torch.cat([update.trajectory[..., :2], update.actions], -1)
        batch = torch.cat([batch, update.trajectory[..., 2:]], -1).double().numpy() * scale + mean
        assert batch.shape == (64, H, 6)
        for window in batch:
            t, episode = window[0, :2].round().astype(int)
            start = int(np.flatnonzero((rows[:, :2] == (t, episode)).all(axis=1))[0])
            length, end = ENDS[episode % len(ENDS)]
            inside = min(H, length - t)
            assert start + inside <= update.note
            wanted = rows[start : start + inside]
            if inside < H:  # the window leaves the episode behind its terminal step
                assert end != "truncated"
                padding = wanted[-1].copy()
                padding[4:] = 0.0, 1.0
                wanted = np.vstack([wanted, *[padding] * (H - inside)])
            assert window == pytest.approx(wanted, abs=1e-4)
            starts_seen.add(start)
    possible = {
        start
        for start, (t, episode) in enumerate(rows[:32, :2].astype(int))
        if t + H <= ENDS[episode % 5][0] or ENDS[episode % 5][1] != "truncated"
    }
    assert starts_seen >= possible


@pytest.mark.parametrize("preset", ["official", "paper"])
def test_the_denoisers_loss_is_that_of_the_configured_process(preset, monkeypatch):
    sampler = getattr(pg.SamplerConfig, preset)()
    agent, _ = make_agent(sampler=sampler, policy_updates_per_env_step=0.0)
    agent.learn(10)
    before = copy.deepcopy(agent.world_model.trainer.model)
    updates = spy(monkeypatch, DenoiserTrainer, "update")
    rows = []
    agent.learn(1, callback=lambda _, row: rows.append(row))
    (update,) = updates
    generator = update.generator
    timesteps = torch.randint(4, (32,), generator=generator)
    noise = torch.randn(update.trajectory.shape, generator=generator)
    schedule = pg.NoiseSchedule.cosine(4, 0.5)
    loss, parts = denoising_loss(
        before, update.trajectory, update.actions, timesteps, noise, schedule, sampler
    )
    (row,) = rows
    for name, value in {"loss": loss, **parts}.items():
        assert row[f"denoiser/{name}"] == pytest.approx(value.item(), rel=1e-5), name
    assert torch.equal(agent.training.streams.generator.get_state(), generator.get_state())


def test_training_draws_from_the_agents_own_generators_only():
    agent, _ = make_agent()
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    agent.learn(20)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


# Imagination


def test_the_averaged_denoiser_imagines_by_the_configured_algorithm(monkeypatch):
    sampler = pg.SamplerConfig.official(denoiser_actions="clipped", clip_state_change=None)
    agent, _ = make_agent(
        sampler=sampler,
        guidance=dict(initial=0.05),
        denoiser=dict(ema_decay=0.75, ema_interval=1, ema_start=0),
    )
    average = copy.deepcopy(agent.world_model.trainer.model)
    averaged = [parameter.detach().clone() for parameter in average.parameters()]
    updates = spy(
        monkeypatch,
        DenoiserTrainer,
        "update",
        note=lambda trainer: [p.detach().clone() for p in trainer.model.parameters()],
    )
    agent.learn(25)
    for update in updates:
        averaged = [0.75 * a + 0.25 * w for a, w in zip(averaged, update.note, strict=True)]
    for parameter, value in zip(average.parameters(), averaged, strict=True):
        parameter.data.copy_(value)

    samples = spy(monkeypatch, pg.PolicyGuidedSampler, "sample")
    batch = agent.imagine(8, normalized=True)
    (sample,) = samples

    def by(denoiser):
        return pg.PolicyGuidedSampler(
            denoiser,
            agent.policy,
            pg.NoiseSchedule.cosine(4, 0.5),
            agent.normalizer,
            sampler,
            engine="reference",
            action_bounds=(-1.0, 1.0),
        ).sample(
            sample.initial_observations,
            agent.world_model.guidance.value,
            generator=torch.Generator().set_state(sample.generator.get_state()),
            normalized=True,
        )

    for name in ("observations", "actions", "rewards", "terminals"):
        got, wanted = getattr(batch, name), getattr(by(average), name)
        assert torch.allclose(got, wanted, atol=1e-5), name
    assert not torch.allclose(batch.rewards, by(agent.world_model.trainer.model).rewards, atol=1e-3)


@pytest.mark.parametrize("rescale, low, high", [(True, -1.0, 1.0), (False, LOW, HIGH)])
def test_imagination_clips_at_the_bounds_of_the_policys_space(rescale, low, high):
    options = dict(denoiser_actions="clipped", clip_std=None)
    agent, _ = make_agent(rescale_actions=rescale, sampler=options)
    agent.learn(11)
    seen = []
    hook = agent.denoiser.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    agent.imagine(300)
    hook.remove()
    actions = next(actions for _, actions, _ in seen if len(actions) == 300)
    first_scale = pg.NoiseSchedule.cosine(4, 0.5).alphas_cumprod[-1].sqrt()
    raw = agent.normalizer.unnormalize(actions / first_scale, "actions").flatten(0, 1)
    assert raw.amin(0).numpy() == pytest.approx(np.broadcast_to(low, 2), abs=1e-3)
    assert raw.amax(0).numpy() == pytest.approx(np.broadcast_to(high, 2), abs=1e-3)


def test_imagination_starts_from_stored_observations_that_begin_a_window():
    agent, _ = make_agent()
    agent.learn(28)
    starts = {tuple(row) for row in agent.imagine(500).observations[:, 0].tolist()}
    wanted = {
        (float(t), float(episode))
        for episode, (length, end) in enumerate([*ENDS, ENDS[0], ENDS[1]])
        for t in range(length if end != "truncated" else length - H + 1)
    }
    assert starts == wanted


def test_every_policy_update_imagines_anew_in_normalized_units(monkeypatch):
    agent, _ = make_agent(normalizer=dict(refresh="prefill"))
    samples = spy(monkeypatch, pg.PolicyGuidedSampler, "sample")
    updates = spy(monkeypatch, pg.ActorCritic, "step")
    agent.learn(20)
    mean, scale = moments(replay_rows(agent)[:10])
    stored = {(t, e) for t, e in replay_rows(agent)[:, :2]}
    assert len(samples) == len(updates) == 10
    for sample, update in zip(samples, updates, strict=True):
        assert sample.normalized and sample.noise is None
        starts = sample.initial_observations.double().numpy() * scale[:2] + mean[:2]
        assert starts.shape == (16, 2)
        assert {tuple(row) for row in starts.round()} <= stored
        assert starts == pytest.approx(starts.round(), abs=1e-4)
        for name in ("observations", "actions", "rewards"):
            assert torch.equal(getattr(update, name), getattr(sample.result, name))
    first, second = samples[0].result, samples[1].result
    assert not torch.equal(first.actions, second.actions)


# A2C


def test_a2c_reads_terminals_as_flags_and_the_progress(monkeypatch):
    agent, _ = make_agent(normalizer=dict(refresh="prefill"))
    agent.learn(10)
    mean, scale = moments(replay_rows(agent))
    assert mean[5] == pytest.approx(0.1) and scale[5] == pytest.approx(0.3, abs=1e-5)
    raw = torch.tensor([[-0.4, 0.05, 0.49], [0.51, 0.7, 3.0]])

    def sample(self, initial_observations, *args, **kwargs):
        return pg.TrajectoryBatch(
            torch.zeros(2, H, 2), torch.zeros(2, H, 2), torch.zeros(2, H), (raw - 0.1) / 0.3
        )

    monkeypatch.setattr(pg.PolicyGuidedSampler, "sample", sample)
    updates = spy(monkeypatch, pg.ActorCritic, "step")
    agent.learn(10)
    assert len(updates) == 10
    for step, update in enumerate(updates, start=11):
        assert update.terminals.tolist() == [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
        assert update.terminals.dtype == torch.float32
        assert update.progress == pytest.approx(step / 20)
    agent.learn(20)  # what is annealed ends with the last call
    assert [update.progress for update in updates[10:]] == pytest.approx(np.arange(21, 41) / 40)


@pytest.mark.parametrize("field", ["observations", "actions", "rewards", "terminals"])
def test_an_imagined_batch_that_is_not_finite_is_named_and_not_learnt_from(field, monkeypatch):
    agent, _ = make_agent()

    def spoil(self, *args, real=pg.PolicyGuidedSampler.sample, **kwargs):
        batch = real(self, *args, **kwargs)
        getattr(batch, field)[3, 1] = torch.nan
        return batch

    monkeypatch.setattr(pg.PolicyGuidedSampler, "sample", spoil)
    updates = spy(monkeypatch, pg.ActorCritic, "step")
    with pytest.raises(pg.NonFiniteError, match=f"step 11: the imagined {field} are not finite"):
        agent.learn(12)
    assert updates == []


def test_one_policy_update_by_hand(monkeypatch):
    """What A2C makes of an imagined batch with the configured settings, and delta after it."""
    a2c = dict(gamma=0.8, target_update=0.03, final_target_update=0.01, actor_learning_rate=1e-3)
    agent, _ = make_agent(a2c=a2c, guidance=dict(initial=0.2, learning_rate=0.5))
    agent.learn(10)
    policy = copy.deepcopy(agent.training.learner.policy)
    value_function = copy.deepcopy(agent.training.learner.value_function)
    mean, scale = (m[2:4] for m in moments(replay_rows(agent)))
    samples = spy(monkeypatch, pg.PolicyGuidedSampler, "sample")
    rows = []
    agent.learn(1, callback=lambda _, row: rows.append(row))
    (sample,), (row,) = samples, rows
    batch = sample.result
    terminals = agent.normalizer.unnormalize(batch.terminals, "terminals") > 0.5

    raw_observations = agent.normalizer.unnormalize(batch.observations, "observations")[:, :-1]
    action_mean, action_std = policy_at(policy, raw_observations)
    standardized = (batch.actions[:, :-1].numpy() * scale + mean - action_mean) / action_std
    spread = standardized.reshape(-1, 2).std(axis=0, ddof=1).mean()
    assert row["a2c/action_std"] == pytest.approx(spread, rel=1e-4)
    assert sample.guidance_scale == 0.2
    assert agent.world_model.guidance.value.item() == pytest.approx(
        0.2 * np.exp(0.5 * (spread - 1)), rel=1e-4
    )
    assert row["a2c/guidance_scale"] == agent.world_model.guidance.value

    own = pg.ActorCritic(policy, value_function, agent.normalizer, make_config(a2c=a2c).a2c)
    metrics = own.update(
        batch.observations, batch.actions, batch.rewards, terminals.float(), progress=1.0
    )
    for name, value in metrics.items():
        assert row[f"a2c/{name}"] == pytest.approx(value, rel=1e-5, abs=1e-7), name
    for got, wanted in zip(agent.policy.parameters(), own.policy.parameters(), strict=True):
        assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-6)


# Delta

SPREADS = dict(action_std=1.7, action_mean_abs=0.6, action_mean=-0.8, policy_std=0.5)


@pytest.mark.parametrize("statistic, spread", [("std", 1.7), ("mean_abs", 0.6)])
@pytest.mark.parametrize("rule", ["log", "linear"])
def test_delta_follows_the_configured_spread_and_guides_the_next_imagining(
    rule, statistic, spread, monkeypatch
):
    agent, _ = make_agent(
        guidance=dict(initial=0.2, rule=rule, learning_rate=0.1, statistic=statistic)
    )
    samples = spy(monkeypatch, pg.PolicyGuidedSampler, "sample")
    spy(monkeypatch, pg.ActorCritic, "step", instead=lambda *_, **__: dict(SPREADS))
    agent.learn(14)
    n = np.arange(5)
    wanted = 0.2 * np.exp(0.1 * (spread - 1) * n) if rule == "log" else 0.2 + 0.1 * (spread - 1) * n
    assert [sample.guidance_scale.item() for sample in samples] == pytest.approx(wanted[:4])
    assert agent.world_model.guidance.value.item() == pytest.approx(wanted[4])
    agent.imagine(2)
    assert samples[-1].guidance_scale == agent.world_model.guidance.value


@pytest.mark.parametrize("action_update", ["sample", "none"])
def test_delta_stays_where_nothing_is_guided(action_update, monkeypatch):
    agent, _ = make_agent(guidance=dict(initial=0.2), sampler=dict(action_update=action_update))
    spy(monkeypatch, pg.ActorCritic, "step", instead=lambda *_, **__: dict(SPREADS))
    agent.learn(14)
    assert agent.world_model.guidance.value == 0.2


# When what happens


def test_order_and_ratio_of_steps_and_updates(monkeypatch):
    agent, _ = make_agent(
        learning_starts=4,
        policy_delay_steps=2,
        policy_updates_per_env_step=1.5,
        denoiser=dict(pretrain_updates=3, updates_per_env_step=0.5),
    )
    events = []
    for cls, name, letter in (
        (type(agent.replay), "add", "s"),
        (DenoiserTrainer, "update", "d"),
        (pg.ActorCritic, "step", "p"),
    ):
        real = getattr(cls, name)

        def noted(self, *args, real=real, letter=letter, **kwargs):
            events.append(letter)
            return real(self, *args, **kwargs)

        monkeypatch.setattr(cls, name, noted)
    agent.learn(10)
    assert "".join(events) == "ssssdddssdspsdppspsdpp"


def test_rows_of_metrics_are_means_since_the_last_row(monkeypatch):
    agent, (env, *_) = make_agent(log_interval=10)
    updates = spy(monkeypatch, DenoiserTrainer, "update")
    rows = []
    agent.learn(35, callback=lambda a, row: rows.append((a.num_timesteps, row)))
    losses = [update.result["loss"].item() for update in updates]
    assert [step for step, _ in rows] == [0, 10, 20, 30, 35]
    rows = dict(rows)
    assert "denoiser/loss" not in rows[10]
    assert rows[20]["denoiser/loss"] == pytest.approx(np.mean(losses[:10]))
    assert rows[30]["denoiser/loss"] == pytest.approx(np.mean(losses[10:20]))
    assert rows[35]["denoiser/loss"] == pytest.approx(np.mean(losses[20:]))
    rewards = env.column("reward")
    wanted = [rewards[12:18].sum(), rewards[18:20].sum()]
    assert rows[20]["train/episode_return"] == pytest.approx(
        np.mean([rewards[7:12].sum(), *wanted]), rel=1e-5
    )
    assert rows[20]["train/episode_length"] == pytest.approx((5 + 6 + 2) / 3)


@pytest.mark.parametrize("world_model", ["trajectory_diffusion", "autoregressive"])
def test_imagined_actions_are_measured_every_so_many_policy_updates(
    world_model, monkeypatch, tmp_path
):
    options = dict(world_model=world_model, log_interval=1, imagined_batch_size=64)
    plain, measured = [], []
    agent, _ = make_agent(**options)
    agent.learn(20, callback=lambda _, row: plain.append(row))
    agent, _ = make_agent(**options, diagnostics_interval=4)
    wanted = []

    def measure(self, observations, actions, terminals):
        found = on_policy_statistics(self.policy, self.normalizer, observations, actions, terminals)
        wanted.append({f"on_policy/{name}": value for name, value in vars(found).items()})

    real = pg.ActorCritic.step

    def step(self, observations, actions, rewards, terminals, progress):
        measure(self, observations, actions, terminals)
        return real(self, observations, actions, rewards, terminals, progress)

    monkeypatch.setattr(pg.ActorCritic, "step", step)
    agent.learn(13, callback=lambda _, row: measured.append(row))
    agent.save(tmp_path / "saved")
    names = [f"on_policy/{name}" for name in ("r2", "std", "ks", "ks_floor", "autocorrelation")]
    found = [{n: v for n, v in row.items() if n.startswith("on_policy/")} for row in measured]
    assert found == [{}] * 11 + [wanted[0], {}, {}]
    assert set(wanted[0]) == set(names) and all(np.isfinite(list(wanted[0].values())))
    untouched = [
        {n: v for n, v in row.items() if not n.startswith(("on_policy/", "time/", "eval/"))}
        for row in measured
    ]
    assert untouched[:13] == [
        {n: v for n, v in row.items() if not n.startswith(("time/", "eval/"))} for row in plain[:13]
    ]

    with pytest.warns(UserWarning, match="not deterministic"):  # the count of its episodes
        loaded = pg.PolyGRAD.load(tmp_path / "saved", env=Line, device="cpu")
        rows = []
        loaded.learn(6, callback=lambda _, row: rows.append(row))
    assert ["on_policy/r2" in row for row in rows] == [False, True, False, False, False, True]
    assert rows[1]["on_policy/r2"] == wanted[4]["on_policy/r2"]


def test_a_batch_too_small_to_be_measured_is_refused():
    with pytest.raises(pg.InputError, match="imagined_batch_size must be at least 4 with diagnost"):
        make_config(imagined_batch_size=3, diagnostics_interval=1)


@pytest.mark.parametrize("world_model", ["trajectory_diffusion", "autoregressive"])
def test_every_evaluation_compares_gradients_where_asked_for(world_model):
    options = dict(world_model=world_model, sampler__denoiser_actions="clipped")
    rows = {}
    for num in (0, 32):
        config = tiny_config(**options, gradient_trajectories=num)
        agent, rows[num] = pg.PolyGRAD("Pendulum-v1", seed=0, device="cpu", config=config), []
        agent.learn(130, callback=lambda _, row, num=num: rows[num].append(row))
    ways = ("cosine", "cosine_ceiling", "cosine_lambda_0", "cosine_all_starts")
    found = [{k: v for k, v in row.items() if k.startswith("gradient/")} for row in rows[32]]
    evaluated = ["eval/mean_reward" in row for row in rows[32]]
    assert evaluated[0] and not found[0]  # nothing to start from yet
    assert [bool(columns) for columns in found[1:]] == evaluated[1:] and sum(evaluated) == 4
    for columns in filter(None, found):
        assert all(-1 <= columns[f"gradient/{way}"] <= 1 for way in ways)
        assert columns["gradient/one_step_error"] > 0
        assert columns["gradient/missed_terminals"] == 0  # there are none
        assert 0 <= columns["gradient/false_terminals"] <= 1
        # episodes of 200 steps tell nothing of the critic
        assert not any(name.startswith("gradient/critic") for name in columns)
    plain = [
        [{k: v for k, v in row.items() if not k.startswith(("gradient/", "time/"))} for row in part]
        for part in rows.values()
    ]
    assert plain[0] == plain[1]


def test_gradients_of_an_environment_that_cannot_be_simulated_are_refused_at_once():
    agent, environments = make_agent(gradient_trajectories=8)
    with pytest.raises(pg.InputError, match="must be an environment whose observations determine"):
        agent.learn(20)
    assert agent.num_timesteps == 0 and not environments[0].steps


# Evaluation


def test_evaluation_acts_by_the_mean_and_counts_the_environments_rewards():
    agent, (env, evaluation) = make_agent()
    spread_out(agent.policy)
    policies = []
    agent.learn(12, callback=lambda a, _: policies.append(copy.deepcopy(a.policy)))
    assert len(env.steps) == 12  # no step of the training environment
    lengths = [length for length, _ in ENDS]
    at_start, at_end = evaluation.steps[:4], evaluation.steps[4:]
    assert len(at_start) == lengths[0] and len(at_end) == lengths[1]
    for policy, steps in zip(policies, (at_start, at_end), strict=True):
        mean, _ = policy_at(policy, np.array([step["observation"] for step in steps]))
        actions = np.array([step["action"] for step in steps])
        assert actions == pytest.approx(to_environment(mean), abs=1e-5)
    assert evaluation.seeds[0] == evaluation.seeds[1]  # the same episode

    statistics = agent.evaluate(1)
    assert statistics.returns == pytest.approx([evaluation.column("reward")[7:].sum()])
    assert statistics.lengths.tolist() == [5]
    agent.evaluate(1, seed=8, deterministic=False)
    assert evaluation.seeds[2] == evaluation.seeds[0] != evaluation.seeds[3]
    drawn = evaluation.steps[12:]
    mean, _ = policy_at(agent.policy, np.array([step["observation"] for step in drawn]))
    assert np.abs(np.array([s["action"] for s in drawn]) - to_environment(mean)).max() > 0.1


def test_an_evaluation_plays_the_configured_number_of_episodes():
    agent, made = make_agent(eval_episodes=3)
    rows, played = [], []

    def note(_, row):
        rows.append(row)
        if len(rows) == 1:  # the evaluation before the first step
            played.extend(copy.deepcopy([env for env in made[1:] if env.steps]))

    agent.learn(1, callback=note)
    assert sum(len(env.seeds) for env in played) == 3
    assert len({seed for env in played for seed in env.seeds}) == 3
    returns = [env.column("reward").sum() for env in played]
    assert rows[0]["eval/mean_reward"] == pytest.approx(sum(returns) / 3)
    assert rows[0]["eval/mean_episode_length"] == ENDS[0][0]
    again = {seed for env in made[1:] for seed in env.seeds}
    assert len(again) == 3  # the evaluation at the end plays the same ones


def test_the_best_checkpoint_is_that_of_the_best_evaluation_and_of_equals_the_last(tmp_path):
    agent, _ = make_agent(
        run_dir=tmp_path, scores=(3.0, 7.0, 5.0, 7.0, 2.0), learning_starts=4, eval_interval=4
    )
    seen = {}

    def note(agent, row):
        seen[agent.num_timesteps] = row, copy.deepcopy(agent.policy.state_dict())

    agent.learn(20, callback=note)
    rewards = {step: row["eval/mean_reward"] for step, (row, _) in seen.items()}
    assert rewards == {0: 3.0, 8: 7.0, 12: 5.0, 16: 7.0, 20: 2.0}
    assert [row["eval/best_mean_reward"] for row, _ in seen.values()] == [3.0, 7.0, 7.0, 7.0, 7.0]
    best = pg.PolyGRAD.load(tmp_path, env=Line, checkpoint="best", device="cpu")
    assert best.num_timesteps == 16
    for name, weight in best.policy.state_dict().items():
        assert torch.equal(weight, seen[16][1][name]), name
        assert not torch.equal(weight, seen[20][1][name]), name
