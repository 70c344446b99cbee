"""Modules that are not, or no longer, what their constructors made are called as they are."""

import copy
import pickle
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import polygrad_fast as pg
from polygrad_fast.sampling import sampler as sampler_module
from polygrad_fast.sampling.folding import why_foreign
from polygrad_fast.sampling.torch_engine import TorchEngine

S, A, H, K, B = 3, 2, 4, 3, 5


def make_denoiser(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "transformer":
        denoiser = pg.TransformerDenoiser(S, A, H, hidden_dim=16, num_layers=2)
        with torch.no_grad():  # the initial weights are so small that no block matters
            for parameter in denoiser.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape))
        return denoiser
    return pg.ResidualMLPDenoiser(S, A, H, hidden_dim=16, num_layers=2)


def make_parts(kind: str = "residual_mlp") -> dict:
    normalizer = pg.Normalizer.from_moments(
        observations=(torch.ones(S), torch.full((S,), 2.0)),
        actions=(torch.zeros(A), torch.ones(A)),
    )
    policy = pg.GaussianPolicy(S, A, 16, init_std=0.5, normalizer=normalizer)
    return {
        "denoiser": make_denoiser(kind),
        "policy": policy,
        "schedule": pg.NoiseSchedule.cosine(K),
        "normalizer": normalizer,
    }


def sample(sampler: pg.PolicyGuidedSampler) -> pg.TrajectoryBatch:
    """One sample of given noise; a dropout draws the same from torch's generator each time."""
    generator = torch.Generator().manual_seed(3)
    shapes = (B, H, S + 2), (B, H, A), (K, B, H, S + 2), (K, B, H, A)
    noise = pg.SampleNoise(*(torch.randn(shape, generator=generator) for shape in shapes))
    torch.manual_seed(5)
    return sampler.sample(torch.randn(B, S, generator=generator), 0.05, noise=noise)


class LoRALinear(nn.Linear):
    """The weight plus a product of two narrow ones."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features)
        self.load_state_dict(linear.state_dict())
        self.down = nn.Parameter(torch.randn(2, linear.in_features))
        self.up = nn.Parameter(torch.randn(linear.out_features, 2))

    def forward(self, x):
        return super().forward(x) + x @ self.down.T @ self.up.T


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


def set_linear(module: nn.Module, make) -> None:
    """Put make(linear) in the place of a Linear in the middle of a network."""
    if isinstance(module, pg.GaussianPolicy):
        module.network[3] = make(module.network[3])
    elif isinstance(module, pg.TransformerDenoiser):
        module.blocks[1].mlp_input = make(module.blocks[1].mlp_input)
    else:
        module.blocks[1].linear = make(module.blocks[1].linear)


def with_linear(change):
    """Return what changes a Linear of a module and puts it back."""

    def apply(module):
        set_linear(module, lambda linear: change(linear) or linear)

    return apply


def old_weight_norm(linear):
    nn.utils.weight_norm(linear)
    with torch.no_grad():
        linear.weight_g.mul_(2.0)


def new_weight_norm(linear):
    parametrizations.weight_norm(linear)
    with torch.no_grad():
        linear.parametrizations.weight.original0.mul_(2.0)


def own_forward(linear):
    linear.forward = types.MethodType(lambda self, x: nn.Linear.forward(self, x).sin(), linear)


def own_forward_on_top(module):
    kind = type(module)
    if kind is pg.GaussianPolicy:
        module.forward = lambda o: tuple(0.5 * part for part in kind.forward(module, o))
    else:
        module.forward = lambda *inputs: 0.5 * kind.forward(module, *inputs)


def hook_on_top(module):
    def halve(module, inputs, output):
        return tuple(0.5 * o for o in output) if isinstance(output, tuple) else 0.5 * output

    module.register_forward_hook(halve)


def other_eps(module):
    norms = [part for part in module.modules() if isinstance(part, nn.LayerNorm)]
    norms[0].eps = 1.0


CHANGES = {
    "hook": with_linear(lambda m: m.register_forward_hook(lambda m, i, o: o.sin()) and None),
    "pre-hook": with_linear(
        lambda m: m.register_forward_pre_hook(lambda m, i: (i[0].sin(),)) and None
    ),
    "hook on top": hook_on_top,
    "parametrization": with_linear(
        lambda m: parametrize.register_parametrization(m, "weight", Double())
    ),
    "weight_norm": with_linear(new_weight_norm),
    "old weight_norm": with_linear(old_weight_norm),
    "pruning": with_linear(lambda m: prune.l1_unstructured(m, "weight", 0.5)),
    "LoRA": with_linear(LoRALinear),
    "dropout": with_linear(lambda m: nn.Sequential(m, nn.Dropout(0.5))),
    "own forward": with_linear(own_forward),
    "own forward on top": own_forward_on_top,
    "another norm": lambda m: other_eps(m),
    "no bias": with_linear(lambda m: nn.Linear(m.in_features, m.out_features, bias=False)),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("changed", ["residual_mlp", "transformer", "policy"])
def test_a_change_after_construction_is_followed(changed, change):
    parts = make_parts("transformer" if changed == "transformer" else "residual_mlp")
    module = parts["policy" if changed == "policy" else "denoiser"]
    engines = {n: pg.PolicyGuidedSampler(**parts, engine=n) for n in ("reference", "torch")}
    before = {name: sample(sampler) for name, sampler in engines.items()}
    CHANGES[change](module)
    assert why_foreign(module) is not None
    after = {name: sample(sampler) for name, sampler in engines.items()}
    for name in ("observations", "actions"):
        got, wanted = (getattr(after[engine], name) for engine in ("torch", "reference"))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    moved = [
        (getattr(after["torch"], name) - getattr(before["torch"], name)).abs().max()
        for name in ("observations", "actions")
    ]
    assert max(moved) > 1e-3, "the change must have an effect"
    rebuilt = pg.PolicyGuidedSampler(**parts, engine="torch")
    assert torch.equal(sample(rebuilt).actions, after["torch"].actions)


def test_another_activation_in_the_policy():
    parts = make_parts()
    sampler = pg.PolicyGuidedSampler(**parts, engine="torch")
    before = sample(sampler)
    parts["policy"].network[2] = nn.Tanh()
    wanted = sample(pg.PolicyGuidedSampler(**parts, engine="reference"))
    got = sample(sampler)
    torch.testing.assert_close(got.actions, wanted.actions, rtol=1e-4, atol=1e-4)
    assert (got.actions - before.actions).abs().max() > 1e-3


def test_a_hook_for_all_modules_is_called():
    parts = make_parts()
    sampler = pg.PolicyGuidedSampler(**parts, engine="torch")
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(m))
    try:
        sample(sampler)
    finally:
        handle.remove()
    assert parts["denoiser"].output in seen and parts["policy"].network[0] in seen


def test_a_backward_hook_on_the_policy_is_called_where_its_gradient_is_followed():
    parts = make_parts()
    config = pg.SamplerConfig.official(update_states=True)
    sampler = pg.PolicyGuidedSampler(**parts, config=config, engine="torch")
    calls = []
    parts["policy"].network[0].register_full_backward_hook(lambda *arguments: calls.append(1))
    sample(sampler)
    assert len(calls) == K - 1
    assert why_foreign(parts["policy"], differentiated=True) == "has a backward hook"
    assert why_foreign(parts["policy"]) is None, "where no gradient is followed"


@pytest.mark.parametrize("engine", ["reference", "torch"])
def test_a_hook_that_records_sees_the_sample_only(engine):
    parts = make_parts()
    sampler, seen = pg.PolicyGuidedSampler(**parts, engine=engine), []
    for part in (parts["denoiser"].blocks[0], parts["policy"].network[0]):
        part.register_forward_hook(lambda module, inputs, output: seen.append(output))
    sample(sampler)
    assert len(seen) == 2 * K and all(len(output) == B for output in seen)


def test_a_change_that_is_undone_is_folded_again():
    parts = make_parts()
    sampler = pg.PolicyGuidedSampler(**parts, engine="torch", dtype="bfloat16")
    before, engine = sample(sampler), sampler._engine
    assert sample(sampler) is not None and sampler._engine is engine, "nothing changed"
    hook = parts["denoiser"].blocks[0].register_forward_hook(lambda m, i, o: 2 * o)
    with pytest.raises(
        pg.InputError, match="calls a denoiser that has a forward hook in blocks.0 .*'bfloat16'"
    ):
        sample(sampler)
    hook.remove()
    assert torch.equal(sample(sampler).actions, before.actions)


def test_a_replaced_part_of_the_same_kind_is_read():
    """And folded: LoRA merged back into a plain Linear."""
    parts = make_parts()
    sampler = pg.PolicyGuidedSampler(**parts, engine="torch")
    sample(sampler)
    parts["policy"].network[3] = nn.Linear(16, 16)
    assert why_foreign(parts["policy"]) is None
    wanted = sample(pg.PolicyGuidedSampler(**parts, engine="reference"))
    torch.testing.assert_close(sample(sampler).actions, wanted.actions, rtol=1e-4, atol=1e-4)


def test_auto_falls_back_once_when_triton_refuses_a_change(monkeypatch):
    """As on a GPU: triton takes what can be folded only."""

    class Triton(TorchEngine):
        def __init__(self, components, dtype):
            foreign = why_foreign(components.denoiser)
            if foreign:
                raise pg.InputError(f"no denoiser that {foreign}")
            super().__init__(components, "float32")

    build = sampler_module._build_engine
    monkeypatch.setattr(sampler_module, "TritonEngine", Triton)

    def build_as_on_a_gpu(name, components, dtype):
        try:
            return "triton", Triton(components, dtype)
        except pg.InputError:
            if name == "triton":
                raise
        fake = copy.copy(components)
        object.__setattr__(fake, "device", types.SimpleNamespace(type="cuda"))
        monkeypatch.setattr(sampler_module, "TorchEngine", lambda c, d: TorchEngine(components, d))
        return build(name, fake, dtype)

    monkeypatch.setattr(sampler_module, "_build_engine", build_as_on_a_gpu)
    parts = make_parts()
    auto = pg.PolicyGuidedSampler(**parts)
    named = pg.PolicyGuidedSampler(**parts, engine="triton")
    assert auto.engine == named.engine == "triton"
    parts["denoiser"].blocks[0].register_forward_hook(lambda m, i, o: 2 * o)
    with pytest.warns(UserWarning, match="falls back to 'torch': .* forward hook") as caught:
        sample(auto)
        sample(auto)
    assert len(caught) == 1 and auto.engine == "torch"
    with pytest.raises(pg.InputError, match="no denoiser that has a forward hook in blocks.0"):
        sample(named)


@pytest.mark.parametrize("kind", ["residual_mlp", "transformer", "policy"])
def test_what_leaves_a_network_as_it_was_made(kind):
    module = make_parts()["policy"] if kind == "policy" else make_denoiser(kind)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    twin.load_state_dict(module.state_dict())
    twin.eval().requires_grad_(False).double().float()
    twin.note = "of mine"
    twin.counter = 3
    for name, parameter in list(twin.named_parameters()):
        owner = twin.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], nn.Parameter(parameter.clone()))
    assert why_foreign(twin) is None


def test_reasons():
    assert why_foreign(nn.Linear(1, 1)) == "is a Linear"
    assert why_foreign(lambda: 0) == "is a function"
    policy = make_parts()["policy"]
    policy.network.append(nn.Identity())
    assert why_foreign(policy) == "has other parts in network than its constructor makes"
    policy = make_parts()["policy"]
    policy.squash = lambda outputs: (outputs, policy.std.expand_as(outputs))
    assert why_foreign(policy) == "has a squash of its own"
    denoiser = make_denoiser("residual_mlp")
    denoiser.blocks[1].norm = None
    assert why_foreign(denoiser) == "has other parts in blocks.1 than its constructor makes"


def test_a_class_whose_forward_was_replaced(monkeypatch):
    denoiser = make_denoiser("residual_mlp")
    monkeypatch.setattr(pg.ResidualMLPDenoiser, "forward", lambda self, x, u, k: 0 * x)
    reason = "is a ResidualMLPDenoiser with another forward"
    assert why_foreign(denoiser) == why_foreign(make_denoiser("residual_mlp")) == reason
    monkeypatch.undo()
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x)
    assert "another forward in" in why_foreign(denoiser)
