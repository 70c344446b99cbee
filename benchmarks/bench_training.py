"""A denoiser update, an A2C update, and a whole update of Algorithm 3.

    pytest benchmarks/bench_training.py --benchmark-only --rows rows.jsonl

The first two are held against their formulas, written out in float64: losses, gradients and the
step of the optimizer, taken from its state on the float64 gradient. The whole update is the
agent's own code: as many environment steps as fall on one policy update, each with acting, storing
and its denoiser updates, then a batch imagined and the A2C update; its sampler, denoiser and
actor-critic pass the checks of the parts first, and then one update is watched. Its dtype is the
sampler's, and its floor takes all FLOPs in that dtype, although training computes in float32.
"""

import copy
import dataclasses
import functools
import math

import pytest
import torch

import polygrad_fast as pg
from harness import sampler_case
from harness.work import Work, parameter_bytes, tensor_bytes
from polygrad_fast.config import DenoiserConfig
from polygrad_fast.diffusion.trainer import DenoiserTrainer

SMALL_DENOISER = {"residual_mlp": 32, "transformer": 16}
MAX_STEP_ERROR = 0.02
"""Of an optimizer's step, relative: Adam divides each gradient by its size, which makes rounding as
large as the rest where a gradient is nothing else. A step left out is 1, a reversed one 2."""


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
            (5, "default", "Walker2d-v5", 64, "reference-float32"),
            # the preset's own batch: a minute or so each, of one update
            (9, "default", "Walker2d-v5", 1024, "torch-float32"),
            (9, "default", "Walker2d-v5", 1024, "torch-bfloat16"),
            (9, "default", "Walker2d-v5", 1024, "reference-float32"),
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


def step_on(optimizer: torch.optim.Optimizer, fresh, gradients) -> list[torch.Tensor]:
    """Return the parameters' changes by a step on these gradients from the optimizer's state.

    Args:
        optimizer: whose state and parameters are copied, but not its options.
        fresh: makes an optimizer of the parameters, with the options it should have.
    """
    copied = copy.deepcopy(optimizer)
    parameters = [p for group in copied.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in parameters]
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = None if gradient is None else gradient.to(p)
    stepping = fresh(parameters)
    stepping.state.update(copied.state)
    stepping.step()
    return [p.detach() - b for p, b in zip(parameters, before, strict=True)]


def weights(module: torch.nn.Module) -> list[torch.Tensor]:
    """Return copies of a module's parameters."""
    return [p.detach().clone() for p in module.parameters()]


def moved(module: torch.nn.Module, before: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return how far the parameters are from those before."""
    return [p.detach() - b for p, b in zip(module.parameters(), before, strict=True)]


def denoiser_errors(trainer: DenoiserTrainer, trajectory, actions, generator) -> dict[str, float]:
    """Take one update and return the relative errors of its loss, its gradient and its step (norms
    of the differences) from Algorithm 1, line 6, in float64; of a denoiser with losses of its own
    from these."""
    exact, schedule = copy.deepcopy(trainer.model).double(), trainer.schedule
    optimizer = torch.optim.Adam(copy.deepcopy(trainer.model).parameters())
    optimizer.load_state_dict(copy.deepcopy(trainer.state_dict()["optimizer"]))  # its own moments
    before = weights(trainer.model)
    config, state = trainer.sampler_config, generator.get_state()
    loss = trainer.update(trajectory, actions, generator)["loss"].double()
    generator.set_state(state)
    x, u = trajectory.double(), actions.double()
    if hasattr(exact, "transition_losses"):
        wanted = sum(exact.transition_losses(x, u).values())
    else:
        wanted = denoising_loss(exact, x, u, schedule, config, generator)
    wanted.backward()
    got = [p.grad.double() for p in trainer.model.parameters() if p.grad is not None]
    gradients = [p.grad for p in exact.parameters()]
    adam = functools.partial(torch.optim.Adam, lr=trainer.config.learning_rate)
    step = step_on(optimizer, adam, gradients)
    return {
        "loss": abs(loss / wanted - 1).item(),
        "gradient": relative_norm(got, [g for g in gradients if g is not None]),
        "step": relative_norm(moved(trainer.model, before), step),
    }


def denoising_loss(denoiser, x, u, schedule, config, generator) -> torch.Tensor:
    """Return the loss of Algorithm 1, line 6, on states [B, H, D] and actions [B, H, A]."""
    k = torch.randint(schedule.num_train_timesteps, (len(x),), generator=generator, device=x.device)
    noise = torch.randn(x.shape, generator=generator, device=x.device).double()
    abar = schedule.alphas_cumprod.double()[k]
    signal, spread = abar.sqrt()[:, None, None], (1 - abar).sqrt()[:, None, None]
    given = torch.zeros_like(x, dtype=torch.bool)
    given[:, 0, :-2] = True
    seen = u * signal if config.scale_actions else u
    prediction = denoiser(torch.where(given, x, signal * x + spread * noise), seen, k)
    target = noise if config.prediction_type == "epsilon" else x
    return (torch.where(given, x, prediction) - target).square().mean()


def relative_norm(got, wanted) -> float:
    """Return |got - wanted| / |wanted| over lists of tensors."""
    difference = sum((g - w).square().sum() for g, w in zip(got, wanted, strict=True))
    return math.sqrt(difference / sum(w.square().sum() for w in wanted))


def a2c_errors(actor_critic: pg.ActorCritic, batch: dict) -> dict[str, float]:
    """Take one update and return the errors of losses and update size, relative to their terms'
    sizes, of gradients and of steps, from section 4.3 and appendix A written out in float64.

    The actor's step is compared in direction: the line search scales it.
    """
    ac, config = actor_critic, actor_critic.config
    policy, value, target = (
        copy.deepcopy(module).double()
        for module in (ac.policy, ac.value_function, ac.target_value_function)
    )
    optimizers = copy.deepcopy(ac.actor_optimizer), copy.deepcopy(ac.critic_optimizer)
    before = weights(ac.policy), weights(ac.value_function)
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
        value_targets = advantages + values[:, :-1]
        goes_on = (1 - ends[:, :-1]).cumprod(1)
        reached = torch.cat([torch.ones_like(goes_on[:, :1]), goes_on[:, :-1]], dim=1)
        alive = goes_on + config.terminal_step_weight * (reached - goes_on)
        if config.normalize_advantages:
            counts = alive if config.advantage_moments == "counted" else torch.ones_like(alive)
            advantages = advantages - (advantages * counts).sum() / counts.sum()
            variance = (advantages.square() * counts).sum() / (counts.sum() - 1)
            advantages = advantages / (variance.sqrt() + 1e-8)
    old, entropy = log_prob(policy)
    actor_terms = -alive * (old * advantages + config.entropy_coef * entropy)
    saturation = policy.network(inputs[:, :-1]).square().mean()
    actor_loss = actor_terms.mean() + config.saturation_coef * saturation
    critic_loss = (0.5 * alive * (value_targets - value(inputs)[:, :-1]).square()).mean()
    (actor_loss + critic_loss).backward()
    for clipped in (policy.network, value):
        max_norm = math.inf if config.max_grad_norm is None else config.max_grad_norm
        torch.nn.utils.clip_grad_norm_(clipped.parameters(), max_norm)
    with torch.no_grad():
        new, _ = log_prob(copy.deepcopy(ac.policy).double())
        update_size = (new - old).abs().mean()
    actor_size, critic_size = actor_terms.detach().abs().mean(), critic_loss.detach()
    gradients = [[p.grad for p in module.parameters()] for module in (policy, value)]
    got = [
        [p.grad.double() for p in module.parameters()] for module in (ac.policy, ac.value_function)
    ]
    rates = config.actor_learning_rate, config.critic_learning_rate
    wanted = [
        step_on(optimizer, functools.partial(torch.optim.AdamW, lr=rate), part)
        for optimizer, rate, part in zip(optimizers, rates, gradients, strict=True)
    ]
    return {
        "actor loss": (abs(metrics["actor_loss"] - actor_loss) / actor_size).item(),
        "critic loss": (abs(metrics["critic_loss"] - critic_loss) / critic_size).item(),
        "update size": (abs(metrics["update_size"] - update_size) / update_size).item(),
        "actor gradient": relative_norm(got[0], gradients[0]),
        "critic gradient": relative_norm(got[1], gradients[1]),
        "actor step": relative_norm(unit(moved(ac.policy, before[0])), unit(wanted[0])),
        "critic step": relative_norm(moved(ac.value_function, before[1]), wanted[1]),
    }


def unit(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return tensors scaled to norm 1 together; NaN if all are zero."""
    norm = math.sqrt(sum(t.double().square().sum() for t in tensors))
    return [t / norm if norm else t * math.nan for t in tensors]


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
        check_denoiser(case, trainer, trajectory, actions, generator, 1e-5)
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
    allowed = {"loss": 1e-4, "size": 1e-2, "gradient": 1e-3, "step": MAX_STEP_ERROR}
    for name, error in a2c_errors(actor_critic, imagined).items():
        case.check(name, error, allowed[name.split()[-1]])


def check_denoiser(case, trainer, trajectory, actions, generator, max_loss_error: float) -> None:
    """Check one update of the denoiser."""
    allowed = {"loss": max_loss_error, "gradient": 1e-3, "step": MAX_STEP_ERROR}
    for name, error in denoiser_errors(trainer, trajectory, actions, generator).items():
        case.check(name, error, allowed[name])


class AgentsEngine:
    """The engine inside an agent's sampler, with the arguments and the result of an engine."""

    def __init__(self, sampler: pg.PolicyGuidedSampler):
        self._sampler = sampler

    def sample(self, s0, guidance_scale, generator, noise, return_chain):
        batch = self._sampler.sample(
            s0,
            guidance_scale,
            generator,
            noise,
            normalized=True,
            return_chain=return_chain,
        )
        numbers = (batch.rewards[..., None], batch.terminals[..., None])
        states = torch.cat((batch.observations, *numbers), dim=-1)
        return states, batch.actions, (batch.chain_trajectories, batch.chain_actions)


def check_whole_update(case, agent, env_steps: int, update) -> int:
    """Take one update; check that it acts by the policy, takes every update that is due, on a whole
    imagined batch, and changes the networks. Return the number of denoiser updates."""
    config, trainer, ac = agent.config, agent.world_model.trainer, agent.training.learner
    noise = torch.Generator().set_state(agent.training.streams.acting.get_state())
    step, learn = agent.environment.step, ac.step
    errors, shapes = [], []

    def watched_step(action):
        observation = torch.from_numpy(agent.environment.observation).to(agent.device)
        with torch.no_grad():
            mean, std = (moment.cpu() for moment in agent.policy(observation))
        wanted = mean + std * torch.randn(mean.shape, generator=noise)
        wanted = agent.action_scaler.to_environment(wanted.numpy())
        errors.append(float(abs(wanted - action).max()))
        return step(action)

    def watched_learn(observations, actions, rewards, terminals, *options):
        imagined = observations, actions, rewards, terminals
        shapes.append({tuple(tensor.shape[:2]) for tensor in imagined})
        return learn(*imagined, *options)

    networks = {"policy": ac.policy, "value": ac.value_function, "denoiser": trainer.model}
    before = {name: weights(module) for name, module in networks.items()}
    counts = trainer.num_updates, agent.num_timesteps, agent.replay.num_steps
    agent.environment.step, ac.step = watched_step, watched_learn
    try:
        update()
    finally:
        del agent.environment.step, ac.step
    case.check("steps missing", abs(agent.num_timesteps - counts[1] - env_steps), 0)
    case.check("steps missing in the environment", abs(len(errors) - env_steps), 0)
    missing = min(env_steps, agent.replay.capacity - counts[2])
    missing -= agent.replay.num_steps - counts[2]
    case.check("steps missing in the replay buffer", abs(missing), 0)
    case.check("actions", torch.tensor(errors).max(), 1e-5)
    updates = trainer.num_updates - counts[0]
    expected = env_steps * config.denoiser.updates_per_env_step
    case.check("denoiser updates missing", abs(updates - expected), 0)
    wanted = [{(config.imagined_batch_size, config.horizon)}]
    case.check("A2C updates other than one on [B, H]", shapes != wanted, 0)
    still = [
        name
        for name, module in networks.items()
        if not any(change.any() for change in moved(module, before[name]))
    ]
    case.check("networks left as they were", len(still), 0)
    return updates


def make_agent(preset, env_id, batch, engine, dtype, device) -> pg.PolyGRAD:
    """Return an agent whose replay buffer holds 200 random steps and whose updates are due."""
    config = pg.TrainConfig.from_preset(preset)
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
        agent.step()
    return agent


@pytest.mark.cases(of=update_cases)
def test_whole_update(bench, preset, env_id, batch, engine, dtype):
    names = {"preset": preset, "env_id": env_id, "batch": batch, "engine": engine}
    with (
        bench.case("whole update", dtype, **names) as case,
        sampler_case.matmul_precision("float32"),
    ):
        agent = make_agent(preset, env_id, batch, engine, dtype, bench.device)
        config = agent.config
        env_steps = round(1 / config.policy_updates_per_env_step)

        def update():
            for _ in range(env_steps):
                agent.step()

        update()
        c = agent.sampler.components
        s0 = agent.normalizer.normalize(agent.replay.sample_initial_observations(8), "observations")
        error, allowed = sampler_case.step_errors(AgentsEngine(agent.sampler), c, dtype, s0)
        case.check("one step", error, allowed)
        windows = agent.replay.sample(config.denoiser.batch_size)
        trajectory = agent.normalizer.normalize_trajectory(
            windows.observations, windows.rewards, windows.terminals
        )
        actions = agent.normalizer.normalize(windows.actions, "actions")
        check_denoiser(
            case,
            agent.world_model.trainer,
            trajectory,
            actions,
            agent.training.streams.generator,
            1e-4,
        )
        imagined = agent.imagine(batch, normalized=True)
        fields = ("observations", "actions", "rewards", "terminals")
        imagined = {name: getattr(imagined, name) for name in fields}
        ends = agent.normalizer.unnormalize(imagined["terminals"], "terminals") > 0.5
        check_a2c(case, agent.training.learner, imagined | {"terminals": ends.float()})
        denoiser_updates = check_whole_update(case, agent, env_steps, update)

        sampling = sampler_case.sample_work(c, batch, dtype)
        trainer, actor_critic = agent.world_model.trainer, agent.training.learner
        training = denoiser_work(trainer, config.denoiser.batch_size)
        learning = a2c_work(actor_critic, batch, config.horizon)
        work = Work(
            sampling.flops + denoiser_updates * training.flops + learning.flops,
            sampling.bytes + denoiser_updates * training.bytes + learning.bytes,
        )
        updates = {"env_steps": env_steps, "denoiser_updates": denoiser_updates}
        case.time(update, 1, "update", work, **updates)
