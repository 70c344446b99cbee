"""A denoiser update, an A2C update, and a whole update of Algorithm 3.

    pytest benchmarks/bench_training.py --benchmark-only --rows rows.jsonl

The first two are held against their formulas, written out in float64. The whole update is the
agent's own code: as many environment steps as fall on one policy update, each with acting, storing
and its denoiser updates, then a batch imagined and the A2C update; its sampler, denoiser and
actor-critic pass the checks of the parts first. Its dtype is the sampler's, and its floor takes all
FLOPs in that dtype, although training computes in float32.
"""

import copy
import dataclasses
import math

import pytest
import torch

import polygrad_fast as pg
from polygrad_fast.agent import _Speed
from polygrad_fast.benchmarking import sampler_case
from polygrad_fast.benchmarking.work import Work, parameter_bytes, tensor_bytes
from polygrad_fast.config import DenoiserConfig
from polygrad_fast.training.denoiser import DenoiserTrainer

SMALL_DENOISER = {"residual_mlp": 32, "transformer": 16}


def denoiser_cases(setting):
    """Return networks, batches and horizons; the paper's batch is 256."""
    shapes = [(0, "residual_mlp", 256, 10), (3, "transformer", 64, 10), (3, "residual_mlp", 64, 50)]
    if setting.device.type == "cuda":
        shapes = [
            (2 + 2 * h + d, denoiser, 256, horizon)
            for h, horizon in enumerate((10, 50, 200))
            for d, denoiser in enumerate(("residual_mlp", "transformer"))
        ]
    if setting.smoke:
        shapes = [(0, "residual_mlp", 4, 3), (0, "transformer", 4, 3)]
    return [
        (importance, {"denoiser": denoiser, "batch": batch, "horizon": horizon})
        for importance, denoiser, batch, horizon in shapes
    ]


def a2c_cases(setting):
    """Return batches of imagined trajectories and horizons."""
    if setting.smoke:
        return [(0, {"batch": 8, "horizon": 4})]
    cases = [(1, {"batch": 1024, "horizon": 10})]
    if setting.device.type == "cuda":
        cases += [(4, {"batch": 1024, "horizon": h}) for h in (50, 200)]
    return cases


def update_cases(setting):
    """Return presets, environments, imagined batches and engines."""
    if setting.smoke:
        runs = [(0, "quick", "Pendulum-v1", 8, "torch-float32")]
    elif setting.device.type == "cpu":
        runs = [
            (1, "default", "Walker2d-v5", 64, "torch-float32"),
            (1, "quick", "InvertedPendulum-v5", 128, "torch-float32"),
            (2, "quick", "InvertedPendulum-v5", 128, "reference-float32"),
            (5, "default", "Walker2d-v5", 64, "reference-float32"),
        ]
    else:
        runs = [
            (rank, "default", "Walker2d-v5", 1024, engine)
            for rank, engine in enumerate(
                ("triton-float16", "torch-float16", "reference-float32", "torch-tf32"), 1
            )
        ]
        runs.append((5, "quick", "InvertedPendulum-v5", 128, "torch-float32"))
    names = ("preset", "env_id", "batch", "engine", "dtype")
    return [
        (importance, dict(zip(names, (*run, *engine.split("-")), strict=True)))
        for importance, *run, engine in runs
    ]


def denoiser_errors(trainer: DenoiserTrainer, trajectory, actions, generator):
    """Take one update and return the relative errors of its loss and of its gradient (norm of the
    difference) from Algorithm 1, line 6, in float64."""
    exact, schedule = copy.deepcopy(trainer.model).double(), trainer.schedule
    config, before = trainer.sampler_config, generator.get_state()
    loss = trainer.update(trajectory, actions, generator)["loss"].double()
    generator.set_state(before)
    num_steps, device = schedule.num_train_timesteps, trajectory.device
    k = torch.randint(num_steps, (len(trajectory),), generator=generator, device=device)
    noise = torch.randn(trajectory.shape, generator=generator, device=device).double()
    x, u, abar = trajectory.double(), actions.double(), schedule.alphas_cumprod.double()[k]
    signal, spread = abar.sqrt()[:, None, None], (1 - abar).sqrt()[:, None, None]
    given = torch.zeros_like(x, dtype=torch.bool)
    given[:, 0, :-2] = True
    seen = u * signal if config.scale_actions else u
    prediction = exact(torch.where(given, x, signal * x + spread * noise), seen, k)
    target = noise if config.prediction_type == "epsilon" else x
    wanted = (torch.where(given, x, prediction) - target).square().mean()
    wanted.backward()
    got = [p.grad.double() for p in trainer.model.parameters() if p.grad is not None]
    gradient = [p.grad for p in exact.parameters() if p.grad is not None]
    return abs(loss / wanted - 1).item(), relative_norm(got, gradient)


def relative_norm(got, wanted) -> float:
    """Return |got - wanted| / |wanted| over lists of tensors."""
    difference = sum((g - w).square().sum() for g, w in zip(got, wanted, strict=True))
    return math.sqrt(difference / sum(w.square().sum() for w in wanted))


def a2c_errors(actor_critic: pg.ActorCritic, batch: dict) -> tuple[float, float, float]:
    """Take one update and return the errors of actor loss, critic loss and update size, in float64
    and relative to their terms' sizes, from section 4.3 and appendix A written out."""
    ac, config = actor_critic, actor_critic.config
    policy, value, target = (
        copy.deepcopy(module).double()
        for module in (ac.policy, ac.value_function, ac.target_value_function)
    )
    metrics = ac.update(**batch)
    normalizer = copy.deepcopy(ac.normalizer).double()
    batch = {name: tensor.double() for name, tensor in batch.items()}
    inputs, rewards, ends = (batch[n] for n in ("observations", "rewards", "terminals"))
    raw_actions = normalizer.unnormalize(batch["actions"], "actions")[:, :-1]
    if not policy.normed_inputs:
        inputs = normalizer.unnormalize(inputs, "observations")
    if config.reward_rms is not None or not policy.normed_inputs:
        rewards = normalizer.unnormalize(rewards, "rewards")
    if config.reward_rms is not None:
        size = normalizer.rewards_mean.square() + normalizer.rewards_scale.square()
        rewards = rewards * config.reward_rms / size.sqrt()

    def log_prob(which):
        mean, std = which.distribution(inputs[:, :-1])
        normal = torch.distributions.Normal(mean, std)
        return normal.log_prob(raw_actions).sum(-1), normal.entropy().sum(-1)

    with torch.no_grad():
        for slow, fast in zip(target.parameters(), value.parameters(), strict=True):
            slow.mul_(config.target_critic_decay).add_(fast, alpha=1 - config.target_critic_decay)
        values, steps = target(inputs), inputs.shape[1] - 1
        advantages = torch.zeros_like(rewards[:, :steps])
        for t in range(steps):
            weight = torch.ones_like(rewards[:, 0])
            for later in range(t, steps):  # sum of (gamma lambda)^l delta_{t+l} up to the end
                goes_on = 1 - ends[:, later]
                following = config.gamma * goes_on * values[:, later + 1]
                delta = rewards[:, later] + following - values[:, later]
                advantages[:, t] += weight * delta
                weight = weight * config.gamma * config.gae_lambda * goes_on
        value_error = (advantages + values[:, :-1] - value(inputs)[:, :-1]).square()
        if config.normalize_advantages:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        alive = (1 - ends[:, :-1]).cumprod(1)
        before, entropy = log_prob(policy)
        actor_terms = -alive * (before * advantages + config.entropy_coef * entropy)
        saturation = policy.network(inputs[:, :-1]).square().mean()
        actor_loss = actor_terms.mean() + config.saturation_coef * saturation
        critic_terms = 0.5 * alive * value_error
        after, _ = log_prob(copy.deepcopy(ac.policy).double())
        update_size = (after - before).abs().mean()
    pairs = (
        (metrics["actor_loss"], actor_loss, actor_terms.abs().mean()),
        (metrics["critic_loss"], critic_terms.mean(), critic_terms.mean()),
        (metrics["update_size"], update_size, update_size),
    )
    return tuple((abs(got - wanted) / scale).item() for got, wanted, scale in pairs)


def denoiser_work(trainer: DenoiserTrainer, batch: int) -> Work:
    """Return an update's work: three times the forward FLOPs; weights and both of Adam's moments
    read and written."""
    model = trainer.model
    flops = 3 * batch * sampler_case.denoiser_flops(model)
    return Work(flops, 6 * parameter_bytes(model))


def a2c_work(actor_critic: pg.ActorCritic, batch: int, horizon: int) -> Work:
    """Return an update's work: forward and backward of policy and value function, target values
    and one trial of the line search."""
    ac = actor_critic
    per_step = 4 * sampler_case.policy_flops(ac.policy)
    per_step += 4 * sampler_case.policy_flops(ac.value_function)
    moved = 6 * parameter_bytes(ac.policy, ac.value_function)
    moved += 2 * parameter_bytes(ac.target_value_function)
    inputs = ac.policy.observation_dim + ac.policy.action_dim + 2
    return Work(batch * horizon * per_step, moved + 4 * batch * horizon * inputs)


@pytest.mark.cases(of=denoiser_cases)
def test_denoiser_update(bench, denoiser, batch, horizon):
    names = {"denoiser": denoiser, "batch": batch, "horizon": horizon}
    with (
        bench.case("denoiser update", "float32", **names) as case,
        sampler_case.matmul_precision("float32"),
    ):
        width = SMALL_DENOISER[denoiser] if bench.session.small else None
        c = sampler_case.build(
            sampler_case.Sizes(hidden_dim=width), horizon, bench.device, denoiser
        )
        config = DenoiserConfig(kind=denoiser)
        trainer = DenoiserTrainer(c.denoiser, c.schedule, config, c.config)
        trajectory = torch.randn(batch, horizon, c.observation_dim + 2, device=bench.device)
        actions = torch.randn(batch, horizon, c.action_dim, device=bench.device)
        generator = torch.Generator(bench.device).manual_seed(0)
        loss, gradient = denoiser_errors(trainer, trajectory, actions, generator)
        case.check("loss", loss, 1e-5)
        case.check("gradient", gradient, 1e-3)
        work = denoiser_work(trainer, batch)
        work = dataclasses.replace(work, bytes=work.bytes + tensor_bytes(trajectory, actions))
        case.time(lambda: trainer.update(trajectory, actions, generator), batch, "window", work)


@pytest.mark.cases(of=a2c_cases)
def test_a2c_update(bench, batch, horizon):
    with (
        bench.case("A2C update", "float32", batch=batch, horizon=horizon) as case,
        sampler_case.matmul_precision("float32"),
    ):
        torch.manual_seed(0)
        observation_dim, action_dim = sampler_case.OBSERVATION_DIM, sampler_case.ACTION_DIM
        normalizer = pg.Normalizer.from_moments(
            observations=(torch.randn(observation_dim), torch.rand(observation_dim) + 0.5),
            actions=(0.1 * torch.randn(action_dim), torch.rand(action_dim) + 0.5),
            rewards=(1.0, 2.0),
        ).to(bench.device)
        policy = pg.GaussianPolicy(observation_dim, action_dim).to(bench.device)
        value_function = pg.ValueFunction(observation_dim).to(bench.device)
        actor_critic = pg.ActorCritic(policy, value_function, normalizer)
        shapes = {"observations": (observation_dim,), "actions": (action_dim,), "rewards": ()}
        imagined = {
            name: torch.randn(batch, horizon, *shape, device=bench.device)
            for name, shape in shapes.items()
        }
        imagined["terminals"] = (torch.rand(batch, horizon, device=bench.device) < 0.01).float()
        check_a2c(case, actor_critic, imagined)
        trials = []

        def update():
            trials.append(actor_critic.update(**imagined)["linesearch_steps"])

        work = a2c_work(actor_critic, batch, horizon)
        case.time(update, batch, "trajectory", work)
        case.update(values=case.row.values | {"mean_linesearch_steps": sum(trials) / len(trials)})


def check_a2c(case, actor_critic, imagined) -> None:
    """Check one update of the actor-critic."""
    actor, critic, size = a2c_errors(actor_critic, imagined)
    case.check("actor loss", actor, 1e-4)
    case.check("critic loss", critic, 1e-4)
    case.check("update size", size, 1e-2)


def make_agent(preset, env_id, batch, engine, dtype, device) -> pg.PolyGRAD:
    """Return an agent whose replay buffer holds 200 random steps and whose updates are due."""
    config = pg.TrainConfig.from_preset(preset, env_id)
    config = dataclasses.replace(
        config,
        denoiser=dataclasses.replace(config.denoiser, pretrain_updates=0),
        imagined_batch_size=batch,
        learning_starts=200,
        policy_delay_steps=0,
        replay_capacity=20_000,
        engine=engine,
        dtype=dtype,
    )
    agent = pg.PolyGRAD(env_id, preset, 0, device, config)
    agent.environment.reset()
    while agent.num_timesteps < config.learning_starts:
        agent._step(_Speed(0))
    return agent


@pytest.mark.cases(of=update_cases)
def test_whole_update(bench, preset, env_id, batch, engine, dtype):
    names = {"preset": preset, "env_id": env_id, "batch": batch, "engine": engine}
    with (
        bench.case("whole update", dtype, **names) as case,
        sampler_case.matmul_precision("float32"),
    ):
        agent = make_agent(preset, env_id, batch, engine, dtype, bench.device)
        config, speed = agent.config, _Speed(0)
        env_steps = round(1 / config.policy_updates_per_env_step)

        def update():
            for _ in range(env_steps):
                agent._step(speed)

        update()
        c = agent.sampler.components
        s0 = agent.normalizer.normalize(agent.replay.sample_initial_observations(8), "observations")
        error, allowed = sampler_case.step_errors(agent.sampler._engine, c, dtype, s0)
        case.check("one step", error, allowed)
        windows = agent.replay.sample(config.denoiser.batch_size)
        trajectory = agent.normalizer.normalize_trajectory(
            windows.observations, windows.rewards, windows.terminals
        )
        actions = agent.normalizer.normalize(windows.actions, "actions")
        loss, gradient = denoiser_errors(
            agent.denoiser_trainer, trajectory, actions, agent.generator
        )
        case.check("loss", loss, 1e-4)
        case.check("gradient", gradient, 1e-3)
        imagined = agent.imagine(batch, normalized=True)
        fields = ("observations", "actions", "rewards", "terminals")
        imagined = {name: getattr(imagined, name) for name in fields}
        ends = agent.normalizer.unnormalize(imagined["terminals"], "terminals") > 0.5
        check_a2c(case, agent.actor_critic, imagined | {"terminals": ends.float()})
        before = agent.denoiser_trainer.num_updates, agent.num_timesteps
        update()
        denoiser_updates = agent.denoiser_trainer.num_updates - before[0]
        expected = env_steps * config.denoiser.updates_per_env_step
        case.check("missing updates", abs(denoiser_updates - expected), 0)

        sampling = sampler_case.sample_work(c, batch, dtype)
        trainer, actor_critic = agent.denoiser_trainer, agent.actor_critic
        training = denoiser_work(trainer, config.denoiser.batch_size)
        learning = a2c_work(actor_critic, batch, config.horizon)
        work = Work(
            sampling.flops + denoiser_updates * training.flops + learning.flops,
            sampling.bytes + denoiser_updates * training.bytes + learning.bytes,
        )
        updates = {"env_steps": env_steps, "denoiser_updates": denoiser_updates}
        case.time(update, 1, "update", work, **updates)
