"""What a denoiser and a policy must offer, and that the sampler says so in one sentence."""

import copy

import pytest
import torch
from torch import nn

import polygrad_fast as pg
from polygrad_fast.protocols import check_trainable

S, A, H, K, B = 3, 2, 4, 3, 5
D = S + 2
ENGINES = ["reference", "torch"]


class OwnDenoiser(nn.Module):
    """The least that a denoiser can be."""

    observation_dim, action_dim, horizon = S, A, H

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D + A, D)

    def forward(self, trajectory, actions, timesteps):
        step = timesteps.view(-1, 1, 1) / K
        return self.linear(torch.cat([trajectory, actions], -1)) + step.to(trajectory.dtype)


class OwnPolicy(nn.Module):
    """One whose standard deviation depends on the state."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(S, 2 * A)

    def forward(self, observations):
        mean, log_std = self.linear(observations).chunk(2, -1)
        return mean, log_std.exp()


def make_sampler(engine="reference", **modules) -> pg.PolicyGuidedSampler:
    torch.manual_seed(0)
    normalizer = pg.Normalizer.from_moments(
        observations=(torch.ones(S), torch.full((S,), 2.0)),
        actions=(torch.zeros(A), torch.full((A,), 0.5)),
    )
    parts = {
        "denoiser": OwnDenoiser(),
        "policy": OwnPolicy(),
        "schedule": pg.NoiseSchedule.cosine(K),
        "normalizer": normalizer,
    }
    return pg.PolicyGuidedSampler(**(parts | modules), engine=engine)


def sample(sampler, **options):
    generator = torch.Generator().manual_seed(1)
    s0 = torch.randn(B, S, generator=generator)
    return sampler.sample(s0, 0.05, generator=generator, **options)


def assert_close(got, wanted):
    for name in ("observations", "actions", "rewards"):
        torch.testing.assert_close(
            getattr(got, name), getattr(wanted, name), rtol=1e-4, atol=1e-4, msg=name
        )


def constant(mean=0.0, std=1.0, shape=(A,)):
    def policy(observations):
        values = torch.zeros(*observations.shape[:-1], *shape)
        return values + mean, values + std

    return policy


def prediction_of(function):
    denoiser = OwnDenoiser()
    denoiser.forward = function
    return denoiser


def test_the_protocols_are_public_and_met_by_the_built_in_networks():
    assert isinstance(pg.ResidualMLPDenoiser(S, A, H, 8, 1), pg.Denoiser)
    assert isinstance(pg.TransformerDenoiser(S, A, H, 8, 1), pg.Denoiser)
    assert isinstance(OwnDenoiser(), pg.Denoiser) and not isinstance(OwnPolicy(), pg.Denoiser)
    assert {"Denoiser", "Policy"} <= set(pg.__all__)


@pytest.mark.parametrize("engine", ENGINES)
def test_plain_callables(engine):
    module, policy = OwnDenoiser(), OwnPolicy()

    def denoise(trajectory, actions, timesteps):
        return module(trajectory, actions, timesteps)

    with pytest.raises(
        pg.InputError, match="denoiser denoise must have the attribute observation_dim.*got None"
    ):
        make_sampler(engine, denoiser=denoise)
    denoise.observation_dim, denoise.action_dim, denoise.horizon = S, A, H
    wanted = sample(make_sampler(engine, denoiser=module, policy=policy))
    got = sample(make_sampler(engine, denoiser=denoise, policy=lambda o: policy(o)))
    assert torch.equal(got.actions, wanted.actions)


def test_engines_agree_on_own_modules():
    modules = {"denoiser": OwnDenoiser(), "policy": OwnPolicy()}
    results = [sample(make_sampler(engine, **modules)) for engine in ENGINES]
    assert_close(*results)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["denoiser", "policy"])
def test_a_module_computes_in_its_weights_dtype(name, engine, dtype):
    torch.manual_seed(3)
    module = OwnDenoiser() if name == "denoiser" else OwnPolicy()
    wanted = sample(make_sampler(engine, **{name: module}))
    got = sample(make_sampler(engine, **{name: copy.deepcopy(module).to(dtype)}))
    assert got.observations.dtype == got.actions.dtype == torch.float32
    error = max(
        (getattr(got, field) - getattr(wanted, field)).abs().max()
        for field in ("observations", "actions")
    )
    assert 0 < error < (1e-4 if dtype == torch.float64 else 0.5)


@pytest.mark.parametrize("engine", ENGINES)
def test_float64_results_of_a_policy_are_converted(engine):
    policy = OwnPolicy()
    wanted = sample(make_sampler(engine, policy=policy))
    got = sample(make_sampler(engine, policy=lambda o: tuple(t.double() for t in policy(o))))
    assert got.actions.dtype == got.observations.dtype == torch.float32
    assert_close(got, wanted)


class InPlace(OwnDenoiser):
    """Overwrites what it is given, after using it."""

    def forward(self, trajectory, actions, timesteps):
        prediction = super().forward(trajectory, actions, timesteps)
        trajectory.fill_(1e6)
        actions.fill_(1e6)
        timesteps.zero_()
        return prediction


@pytest.mark.parametrize("scale_actions", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_denoiser_may_overwrite_its_inputs(engine, scale_actions):
    config = pg.SamplerConfig.official(scale_actions=scale_actions)
    torch.manual_seed(2)
    careful, careless = OwnDenoiser(), InPlace()
    careless.load_state_dict(careful.state_dict())
    got, wanted = (
        sample(make_sampler(engine, denoiser=denoiser, config=config))
        for denoiser in (careless, careful)
    )
    assert torch.equal(got.observations, wanted.observations)
    assert torch.equal(got.actions, wanted.actions)


class InPlacePolicy(OwnPolicy):
    def __init__(self, normed_inputs: bool, overwrites: bool):
        super().__init__()
        self.normed_inputs, self.overwrites = normed_inputs, overwrites

    def forward(self, observations):
        mean, std = super().forward(observations.clone())
        if self.overwrites:
            observations.fill_(1e6)
        return mean, std

    distribution = forward


@pytest.mark.parametrize("policy_input", ["denoised", "posterior_mean", "noisy"])
@pytest.mark.parametrize("normed_inputs", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_policy_may_overwrite_its_inputs(engine, normed_inputs, policy_input):
    config = pg.SamplerConfig.official(policy_input=policy_input)
    results = []
    for overwrites in (False, True):
        torch.manual_seed(4)
        policy = InPlacePolicy(normed_inputs, overwrites)
        results.append(sample(make_sampler(engine, policy=policy, config=config)))
    assert torch.equal(results[0].actions, results[1].actions)
    assert torch.equal(results[0].observations, results[1].observations)


def broken_policy(observations):
    raise KeyError("no such state")


DENOISERS = {
    "the policy": (OwnPolicy(), "denoiser OwnPolicy must have the attribute observation_dim"),
    "a number": (3, "denoiser int must be callable"),
    "an output per action": (
        prediction_of(lambda x, u, k: u),
        r"as denoiser\(trajectory \[3, 4, 5\], actions \[3, 4, 2\], timesteps\), must return a "
        r"prediction of shape \[3, 4, 5\], got \[3, 4, 2\]",
    ),
    "exchanged axes": (prediction_of(lambda x, u, k: x.mT), r"shape \[3, 4, 5\], got \[3, 5, 4\]"),
    "a pair": (prediction_of(lambda x, u, k: (x, u)), "a prediction that is a tensor, got a tuple"),
    "integers": (prediction_of(lambda x, u, k: x.long()), "of floating point, got torch.int64"),
    "other arguments": (prediction_of(lambda x, k: x), "called as denoiser.*, failed: .*argument"),
}


@pytest.mark.parametrize("case", DENOISERS)
def test_what_is_no_denoiser(case):
    denoiser, message = DENOISERS[case]
    with pytest.raises(pg.InputError, match=message):
        make_sampler(denoiser=denoiser)


@pytest.mark.parametrize("name", ["observation_dim", "action_dim", "horizon"])
@pytest.mark.parametrize("value", [0, 2.5, "4", True, None])
def test_dimensions_of_a_denoiser(name, value):
    denoiser = OwnDenoiser()
    setattr(denoiser, name, value)
    with pytest.raises(pg.InputError, match=f"attribute {name}, an integer of at least 1, got"):
        make_sampler(denoiser=denoiser)


POLICIES = {
    "the denoiser": (OwnDenoiser(), r"policy OwnDenoiser, called as policy\(observ.*failed: .*arg"),
    "a number": (3, r"policy int must be callable as policy\(observations\)"),
    "one action of two": (
        constant(shape=(1,)),
        r"must return a mean of shape \[2, 4, 2\], got \[2, 4, 1\]",
    ),
    "one std of two": (
        lambda o: (torch.zeros(*o.shape[:-1], A), torch.ones(*o.shape[:-1], 1)),
        r"must return an std of shape \[2, 4, 2\], got \[2, 4, 1\]",
    ),
    "negative std": (
        constant(std=-0.1),
        "must return an std of positive finite numbers, got -0.1 to -0.1",
    ),
    "zero std": (constant(std=0.0), "must return an std of .*, got 0 to 0"),
    "NaN std": (constant(std=float("nan")), "must return an std of .*, got nan to nan"),
    "infinite std": (constant(std=float("inf")), "must return an std of .*, got inf to inf"),
    "no pair": (lambda o: o, r"must return the pair \(mean, std\), got a Tensor"),
    "a distribution": (
        lambda o: torch.distributions.Normal(o, 1.0),
        r"must return the pair \(mean, std\), got a Normal",
    ),
    "numbers": (lambda o: (0.0, 1.0), "a mean that is a tensor, got a float"),
    "integers": (
        lambda o: tuple(torch.ones(*o.shape[:-1], A, dtype=torch.int64) for _ in range(2)),
        "a mean of floating point, got torch.int64",
    ),
    "an error": (broken_policy, "policy broken_policy, called as policy.*, failed: 'no such state"),
    "lazy": (nn.LazyLinear(A), "must be called once before, got weights without a shape"),
}


@pytest.mark.parametrize("case", POLICIES)
@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_no_policy(engine, case):
    policy, message = POLICIES[case]
    with pytest.raises(pg.InputError, match=message):
        make_sampler(engine, policy=policy)


class WithoutDistribution(OwnPolicy):
    normed_inputs = True


class Halved(pg.GaussianPolicy):
    def forward(self, observations):
        mean, std = super().forward(observations)
        return 0.5 * mean, std


def test_a_policy_on_normalized_observations_must_have_one_meaning():
    with pytest.raises(pg.InputError, match=r"callable as policy.distribution\(normalized obs"):
        make_sampler(policy=WithoutDistribution())
    normalizer = pg.Normalizer(S, A)
    options = {"normed_inputs": True, "normalizer": normalizer}
    hooked, replaced = (pg.GaussianPolicy(S, A, 8, **options) for _ in range(2))
    hooked.register_forward_hook(lambda module, inputs, output: output)
    replaced.forward = lambda observations: (observations[..., :A], torch.ones(A))
    for policy in (Halved(S, A, 8, **options), hooked, replaced):
        with pytest.raises(pg.InputError, match="which policy.distribution leaves out"):
            make_sampler(policy=policy, normalizer=normalizer)
    plain = pg.GaussianPolicy(S, A, 8, **options)
    sampler = make_sampler("torch", policy=plain, normalizer=normalizer)
    sample(sampler)
    plain.register_forward_hook(lambda module, inputs, output: output)
    with pytest.raises(pg.InputError, match="which policy.distribution leaves out"):
        sample(sampler)


class NormedPolicy(OwnPolicy):
    normed_inputs = True

    def distribution(self, inputs):
        return OwnPolicy.forward(self, inputs)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_hook_that_distribution_leaves_out_is_seen_at_any_time(engine):
    policy = NormedPolicy()
    sampler = make_sampler(engine, policy=policy)
    wanted = sample(sampler).actions
    hook = policy.register_forward_hook(lambda module, inputs, output: output)
    with pytest.raises(
        pg.InputError, match="policy NormedPolicy has .* put the hook on a part of it"
    ):
        sample(sampler)
    hook.remove()
    seen = []
    policy.linear.register_forward_hook(lambda module, inputs, output: seen.append(1))
    assert torch.equal(sample(sampler).actions, wanted) and len(seen) == K


@pytest.mark.parametrize("engine", ENGINES)
def test_a_module_that_returns_something_else_later_is_refused(engine):
    """Numbers of another shape would be broadcast."""
    denoiser, policy = OwnDenoiser(), OwnPolicy()
    sampler = make_sampler(engine, denoiser=denoiser, policy=policy)
    sample(sampler)
    policy.forward = lambda o: (o[..., :1], torch.ones_like(o[..., :1]))
    with pytest.raises(
        pg.InputError, match=r"policy OwnPolicy, .* mean of shape \[5, 4, 2\], got \[5, 4, 1\]"
    ):
        sample(sampler)
    del policy.forward
    denoiser.forward = lambda x, u, k: x[:, :1]
    with pytest.raises(
        pg.InputError, match=r"denoiser OwnDenoiser, .* of shape \[5, 4, 5\], got \[5, 1, 5\]"
    ):
        sample(sampler)


def test_moving_states_needs_a_differentiable_policy():
    config = pg.SamplerConfig.official(update_states=True)
    for engine in ENGINES:
        for policy in (constant(), lambda o: (o.detach()[..., :A], o.detach()[..., :A].exp())):
            make_sampler(engine, policy=policy)
            with pytest.raises(
                pg.InputError, match="respect to the observations, which update_states=True wants"
            ):
                make_sampler(engine, policy=policy, config=config)
    results = [sample(make_sampler(e, policy=OwnPolicy(), config=config)) for e in ENGINES]
    assert_close(*results)


def test_a_normalizer_in_another_dtype():
    with pytest.raises(pg.InputError, match="normalizer: observations_mean .*float32, got .*64"):
        make_sampler(normalizer=pg.Normalizer(S, A).double())


class Careless(OwnDenoiser):
    """Draws random numbers and counts its calls, in training mode."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(H)
        self.register_buffer("calls", torch.zeros(()))
        self.dropout = nn.Dropout(0.5)

    def forward(self, trajectory, actions, timesteps):
        self.calls = self.calls + 1
        prediction = super().forward(self.norm(trajectory), actions, timesteps)
        return self.dropout(prediction) + torch.randn(())


class CarelessPolicy(OwnPolicy):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(H)

    def forward(self, observations):
        return super().forward(self.norm(observations) + torch.randn(()))


@pytest.mark.parametrize("engine", ENGINES)
def test_the_check_leaves_no_trace(engine):
    denoiser, policy = Careless(), CarelessPolicy()
    modules = nn.ModuleList([denoiser, policy])
    before, buffer = copy.deepcopy(modules.state_dict()), denoiser.calls
    torch.manual_seed(9)
    state = torch.get_rng_state()
    normalizer = pg.Normalizer(S, A)
    schedule = pg.NoiseSchedule.cosine(K)
    pg.PolicyGuidedSampler(denoiser, policy, schedule, normalizer, engine=engine)
    assert torch.equal(torch.get_rng_state(), state)
    assert denoiser.calls is buffer
    for name, value in modules.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(module.training for module in modules.modules())
    assert all(p.grad is None for p in modules.parameters())


def test_what_cannot_be_trained():
    with pytest.raises(
        pg.InputError, match="policy must be a torch.nn.Module to be trained, got policy"
    ):
        check_trainable("policy", constant())
    frozen = OwnPolicy().requires_grad_(False)
    with pytest.raises(
        pg.InputError, match="policy OwnPolicy must have weights that require a grad"
    ):
        check_trainable("policy", frozen)

    class WithExtraState(OwnPolicy):
        def get_extra_state(self):
            return {"step": 1}

    with pytest.raises(
        pg.InputError, match="must keep tensors only .*, got a dict under '_extra_state"
    ):
        check_trainable("policy", WithExtraState())
