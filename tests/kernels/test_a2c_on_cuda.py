"""The actor-critic on a CUDA device that is imitated, and on a real one: nothing is read on the
host, and one graph computes what a CPU does."""

import copy

import fake_cuda
import pytest
import torch

pytest.importorskip("triton")

import polygrad_fast as pg  # noqa: E402
from polygrad_fast.denoisers.dynamics import Dynamics  # noqa: E402
from polygrad_fast.denoisers.one_step import OneStepNetwork  # noqa: E402
from polygrad_fast.ranks import Ranks  # noqa: E402
from polygrad_fast.sampling.graphs import CapturedFunction  # noqa: E402
from polygrad_fast.training.learner_steps import EAGER_STEPS, LearnerSteps  # noqa: E402

S, A, B, H = 4, 2, 16, 6
FIELDS = ("observations", "actions", "rewards", "terminals")
CONFIGS = {
    "default": {},
    "grown": {"actor_learning_rate": 1e-2},
    "annealed": {"actor_learning_rate": 1e-2, "final_target_update": 0.002},
    "other options": {
        "reward_rms": 0.3,
        "saturation_coef": 0.1,
        "advantage_moments": "counted",
        "max_grad_norm": None,
        "learn_actor_learning_rate": False,
    },
    "no search": {"line_search": False},
    "pathwise": {
        "gradient_estimator": "pathwise",
        "reward_rms": 0.3,
        "actor_learning_rate": 1e-2,
        "final_target_update": 0.002,
    },
    "pathwise, lesser": {"gradient_estimator": "pathwise", "bootstrap": "lesser"},
}


class Own(torch.nn.Module):
    """A policy of the user's, whose std depends on the state."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(S, 8), torch.nn.Tanh())
        self.head = torch.nn.Linear(8, 2 * A)

    def forward(self, observations):
        mean, log_std = self.head(self.body(observations)).chunk(2, -1)
        return mean, 0.5 + log_std.exp()


class Two(Ranks):
    number = 2


def make(device, name, policy="gaussian", normed_inputs=True) -> pg.ActorCritic:
    torch.manual_seed(0)
    normalizer = pg.Normalizer.from_moments(
        observations=(torch.arange(S).float(), torch.linspace(0.5, 2.0, S)),
        actions=(torch.tensor([0.2, -0.4]), torch.tensor([0.6, 1.3])),
        rewards=(1.5, 3.0),
    ).to(device)
    module = pg.GaussianPolicy(
        S, A, 16, init_std=0.6, normed_inputs=normed_inputs, normalizer=normalizer
    )
    options = CONFIGS[name]
    if policy == "own":
        module, options = Own(), options | {"saturation_coef": 0.0}  # it has no network
    value_function = pg.ValueFunction(S, 16)
    network = OneStepNetwork(S, A, 16, 2)
    network.difference_scale.fill_(0.3)
    network.range.lowest.fill_(-1.0)
    network.range.highest.fill_(1.5)
    bounds = torch.tensor([-1.0, -0.5]), torch.tensor([0.8, 1.0])
    dynamics = Dynamics(
        network.requires_grad_(False).to(device),
        normalizer,
        tuple(bound.to(device) for bound in bounds),
    )
    learner = pg.ActorCritic(
        module.to(device),
        value_function.to(device),
        normalizer,
        pg.A2CConfig(**options),
        dynamics=dynamics,
    )
    if name == "grown":
        learner.actor_optimizer.learning_rate.fill_(1e-4)
    return learner


def make_batch(device, seed) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    terminals = (torch.rand(B, H, generator=g) < 0.1).float()
    shapes = {"observations": (B, H, S), "actions": (B, H, A), "rewards": (B, H)}
    drawn = {name: torch.randn(*shape, generator=g) for name, shape in shapes.items()}
    return {name: t.to(device) for name, t in (drawn | {"terminals": terminals}).items()}


def state_of(learner) -> dict[str, torch.Tensor]:
    """Every tensor that a step changes, as they are."""
    tensors = {
        f"{name}.{key}": tensor
        for name, module in learner.modules().items()
        for key, tensor in module.named_parameters()
    }
    for name in ("actor_optimizer", "critic_optimizer", "learning_rate_optimizer"):
        optimizer = getattr(learner, name)
        tensors |= {f"{name}.moments": optimizer.moments, f"{name}.rate": optimizer.learning_rate}
    tensors["log rate"] = learner.log_actor_learning_rate
    return {name: tensor.detach() for name, tensor in tensors.items()}


def assert_same_learners(got, wanted):
    for name, tensor in state_of(wanted).items():
        found = state_of(got)[name].cpu()
        torch.testing.assert_close(found, tensor.cpu(), rtol=1e-3, atol=2e-5, msg=name)


@pytest.fixture
def gpu():
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled here")
    with fake_cuda.installed() as gpu:
        yield gpu


@pytest.mark.parametrize("policy", ["gaussian", "own"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_reads_nothing_on_the_host(gpu, name, policy):
    normed = name != "other options"
    learner, plain = (make(device, name, policy, normed) for device in ("cuda", "cpu"))
    for seed in range(3):
        batch, wanted = make_batch("cuda", seed), plain.step(**make_batch("cpu", seed))
        with gpu.without_syncs():
            found = learner.step(**batch)
        assert found.keys() == wanted.keys()
        assert all(value.is_cuda and value.shape == () for value in found.values())
        for key, value in wanted.items():
            torch.testing.assert_close(found[key].cpu(), value, rtol=2e-3, atol=1e-5, msg=key)
    assert_same_learners(learner, plain)


@pytest.mark.parametrize("field", ["rewards", "observations"])
def test_what_is_not_finite_changes_nothing_there_either(gpu, field):
    learner = make("cuda", "default")
    learner.step(**make_batch("cuda", 0))
    before, batch = copy.deepcopy(state_of(learner)), make_batch("cuda", 1)
    batch[field][2, 1] = torch.nan
    with gpu.without_syncs():
        found = learner.step(**batch)
    assert not torch.stack(list(found.values())).isfinite().all()
    for name, tensor in state_of(learner).items():
        assert torch.equal(tensor, before[name]), name


def capture(learner, device, names) -> CapturedFunction:
    """Return a graph of a step; the steps that its capture takes are undone."""
    before = copy.deepcopy(state_of(learner))

    def step(*tensors):
        found = learner.step(*tensors)
        return tuple(found[name] for name in names)

    example = (*make_batch(device, 0).values(), torch.zeros((), device=device))
    captured = CapturedFunction(step, example)
    for name, tensor in state_of(learner).items():
        tensor.copy_(before[name])
    return captured


def check_graph(device, config="annealed"):
    names = ("actor_loss", "critic_loss", "update_size", "linesearch_steps", "actor_learning_rate")
    learner, plain = (make(d, config) for d in (device, "cpu"))
    captured = capture(learner, device, names)
    for seed in range(4):
        progress = torch.tensor(seed / 4, device=device)
        found = captured(*make_batch(device, seed).values(), progress)
        wanted = plain.step(**make_batch("cpu", seed), progress=seed / 4)
        for name, value in zip(names, found, strict=True):
            torch.testing.assert_close(value.cpu(), wanted[name], rtol=2e-3, atol=1e-5, msg=name)
    assert_same_learners(learner, plain)


@pytest.mark.parametrize("config", ["annealed", "pathwise"])
def test_a_graph_holds_a_step(gpu, config):
    check_graph("cuda", config)
    (graph,) = gpu.graphs
    assert graph.launches["_generalized_advantages_kernel"] == 1


def check_steps(device, restored=False, config="annealed"):
    """Steps of a training: eager ones, then those of a graph, equal a CPU's."""
    learner, plain = (make(d, config) for d in (device, "cpu"))
    steps = LearnerSteps(learner)
    for seed in range(EAGER_STEPS + 4):
        if restored and seed == EAGER_STEPS + 1:  # other moments, at another address
            learner.load_state_dict(copy.deepcopy(learner.state_dict()))
        found = steps(*make_batch(device, seed).values(), progress=seed / 9)
        wanted = plain.step(**make_batch("cpu", seed), progress=seed / 9)
        assert found.keys() == wanted.keys()
        for name, value in found.items():
            torch.testing.assert_close(value.cpu(), wanted[name], rtol=2e-3, atol=1e-5, msg=name)
    assert_same_learners(learner, plain)
    return learner, steps


@pytest.mark.parametrize("config", ["annealed", "pathwise"])
def test_training_steps_come_from_a_graph(gpu, config):
    learner, steps = check_steps("cuda", config=config)
    assert len(gpu.graphs) == 1
    batch = make_batch("cuda", 99)
    with gpu.without_syncs() as launches:
        steps(*batch.values(), progress=0.9)
    assert launches["graph replay"] == 1 and launches.total() < 40
    learner.policy.network[0].register_forward_hook(lambda *_: None)
    with gpu.without_syncs() as launches:
        steps(*batch.values(), progress=0.9)
    assert "graph replay" not in launches, "hooks are run"


def test_restored_moments_are_captured_anew(gpu):
    check_steps("cuda", restored=True)
    assert len(gpu.graphs) == 1, "three eager steps come first, and one is left"


def test_policies_of_the_users_are_stepped_eagerly(gpu):
    learner = make("cuda", "default", "own")
    assert learner.capture_key() is None and make("cpu", "default").capture_key() is None
    together = make("cuda", "default")
    assert together.capture_key() is not None
    together.ranks = Two()
    assert together.capture_key() is None
    steps = LearnerSteps(learner)
    for seed in range(EAGER_STEPS + 2):
        steps(*make_batch("cuda", seed).values(), progress=0.0)
    assert not gpu.graphs


@pytest.mark.gpu
class TestOnAGpu:
    @pytest.mark.parametrize("policy", ["gaussian", "own"])
    def test_a_step_does_not_synchronize(self, policy):
        learner, batch = make("cuda", "annealed", policy), make_batch("cuda", 0)
        learner.step(**batch)
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            learner.step(**batch, progress=torch.zeros((), device="cuda"))
        finally:
            torch.cuda.set_sync_debug_mode(before)

    @pytest.mark.parametrize("config", ["annealed", "pathwise"])
    def test_a_graph_holds_a_step(self, config):
        check_graph("cuda", config)

    @pytest.mark.parametrize("config", ["annealed", "pathwise"])
    @pytest.mark.parametrize("restored", [False, True])
    def test_training_steps_come_from_a_graph(self, restored, config):
        check_steps("cuda", restored, config)
