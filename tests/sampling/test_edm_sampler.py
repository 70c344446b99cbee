"""The stochastic Heun sampler and its engines."""

import copy
import math
import pickle
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from polygrad_fast.config import EDMConfig, EDMTrainingConfig
from polygrad_fast.denoisers.temporal_unet import NORM_OVER, TemporalUNet
from polygrad_fast.diffusion.edm import EDMTrainer, NoiseLevels, denoise, preconditioning
from polygrad_fast.errors import InputError
from polygrad_fast.sampling import packed_unet
from polygrad_fast.sampling.edm_sampler import EDMNoise, EDMSampler, PackedDenoiser, PlainDenoiser
from polygrad_fast.sampling.heun import FixedEntries, heun_sample

S, A = 3, 2
D = S + A + 2
SHORT = EDMConfig(num_inference_steps=5)


def make_unet(features=24, num_levels=2, seed=0, norm_over="row") -> TemporalUNet:
    """Return a network whose biases and scales matter, some scales being negative."""
    generator = torch.Generator().manual_seed(seed)
    unet = TemporalUNet(S, A, features, num_levels, generator, norm_over)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            spread = 1.0 if "norm_" in name else 0.1
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    return unet


class GaussianNetwork(nn.Module):
    """The exact F_theta of data N(0, std^2): D(x; sigma) = std^2 / (std^2 + sigma^2) x."""

    trajectory_dim = D

    def __init__(self, std=0.5, sigma_data=1.0):
        super().__init__()
        self.std, self.sigma_data = std, sigma_data
        self.register_buffer("where", torch.zeros(()))
        self.calls = []

    def forward(self, trajectory, noise_condition):
        sigma = (4 * noise_condition).exp()
        self.calls.append(sigma[0].item())
        c = preconditioning(sigma, self.sigma_data)
        gain = self.std**2 / (self.std**2 + sigma**2)
        return ((gain - c.c_skip) / c.c_out / c.c_in).view(-1, 1, 1) * trajectory


def draw_noise(batch, length, steps, seed=0) -> EDMNoise:
    generator = torch.Generator().manual_seed(seed)
    return EDMNoise(
        torch.randn(batch, length, D, generator=generator),
        torch.randn(steps, batch, length, D, generator=generator),
    )


def error(got, wanted) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


def compare(unet, config, x, dtype="float32", tolerance=3e-6):
    """Hold the packed network against the plain one in float64, at each noise level."""
    packed, exact = PackedDenoiser(unet, config, dtype), copy.deepcopy(unet).double()
    packed.refresh()
    levels = NoiseLevels.of(config)
    plain = PlainDenoiser(exact, config)
    for sigma in {*levels.sigma[:-1], *levels.sigma_hat}:
        noisy = x * math.sqrt(sigma**2 + 1)
        kept = noisy.clone()
        with torch.no_grad():
            got, wanted = packed(noisy, sigma), plain(noisy.double(), sigma)
        assert got.dtype == torch.float32 and torch.equal(noisy, kept)
        assert error(got, wanted) < tolerance, sigma


@settings(max_examples=20, deadline=None)
@given(
    features=st.sampled_from([24, 32, 40]),
    num_levels=st.integers(1, 4),
    extra=st.integers(0, 9),
    batch=st.integers(1, 7),
    cached=st.sampled_from([1, 500, 2**18]),
    norm_over=st.sampled_from(NORM_OVER),
)
def test_the_packed_network_is_the_network(features, num_levels, extra, batch, cached, norm_over):
    unet = make_unet(features, num_levels, norm_over=norm_over)
    x = torch.randn(batch, unet.min_length + extra, D, generator=torch.Generator().manual_seed(1))
    before = packed_unet.CACHED_NUMBERS
    packed_unet.CACHED_NUMBERS = cached
    try:
        compare(unet, SHORT, x, tolerance=2e-5)  # groups of 3 channels: ill-conditioned
    finally:
        packed_unet.CACHED_NUMBERS = before


@pytest.mark.parametrize("norm_over", NORM_OVER)
@pytest.mark.parametrize("scale", [0.0, -1e-20, 1e-6, 1e-3])
def test_scales_that_vanish(scale, norm_over):
    """|s| is divided by; what depends on b alone stays."""
    unet = make_unet(32, 2, norm_over=norm_over)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "norm_" in name and name.endswith("weight"):
                parameter[::3] = scale
    x = torch.randn(3, 9, D, generator=torch.Generator().manual_seed(1))
    compare(unet, SHORT, x, tolerance=5e-6)


@pytest.mark.parametrize("features, norm_over", [(32, "row"), (64, "row"), (32, "window")])
def test_bfloat16_errs_like_autocast(features, norm_over):
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bfloat16")
    unet = make_unet(features, 3, norm_over=norm_over)
    sigma = NoiseLevels.of(SHORT).sigma[2]
    x = torch.randn(8, 16, D, generator=torch.Generator().manual_seed(1))
    packed = PackedDenoiser(unet, SHORT, "bfloat16")
    packed.refresh()
    with torch.no_grad():
        wanted = PlainDenoiser(copy.deepcopy(unet).double(), SHORT)(x.double(), sigma)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            plain = PlainDenoiser(unet, SHORT)(x, sigma)
        assert error(packed(x, sigma), wanted) < 2 * error(plain, wanted)
        assert error(packed(x, sigma), wanted) > 1e-5  # it is half precision


@pytest.mark.parametrize("length", [2, 7, 16])
def test_engines_agree_with_the_same_seed(length):
    unet = make_unet(32)
    results = [
        EDMSampler(unet, SHORT, engine=engine).sample(
            5, length, torch.Generator().manual_seed(3), return_chain=True
        )
        for engine in ("reference", "torch")
    ]
    assert results[0].chain.shape == (5, 5, length, D)
    for reference, other in zip(results[0].chain, results[1].chain, strict=True):
        assert error(other, reference) < 2e-5
    other = EDMSampler(unet, SHORT).sample(5, length, torch.Generator().manual_seed(4))
    assert error(other.trajectories, results[0].trajectories) > 0.1


def test_current_weights_are_read_and_other_sizes_follow():
    unet = make_unet(32)
    sampler = EDMSampler(unet, SHORT)
    for seed, (batch, length) in enumerate(
        [(3, 8), (4, 9), (3, 8), (1, 5), (2, 4), (3, 6), (3, 8)]
    ):
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter.mul_(1.1)
        noise = draw_noise(batch, length, 5, seed)
        got = sampler.sample(batch, length, noise=noise).trajectories
        wanted = EDMSampler(unet, SHORT, engine="reference").sample(batch, length, noise=noise)
        assert error(got, wanted.trajectories) < 2e-5


def test_a_changed_network_is_called_as_it_is():
    unet = make_unet(32)
    sampler = EDMSampler(unet, SHORT)
    noise = draw_noise(2, 6, 5)
    before = sampler.sample(2, 6, noise=noise).trajectories
    unet.output.register_forward_hook(lambda module, inputs, output: 2 * output)
    after = sampler.sample(2, 6, noise=noise).trajectories
    wanted = EDMSampler(unet, SHORT, engine="reference").sample(2, 6, noise=noise).trajectories
    assert torch.equal(after, wanted) and error(after, before) > 0.01


def test_a_replaced_part_is_packed_anew():
    unet = make_unet(32)
    sampler = EDMSampler(unet, SHORT)
    noise = draw_noise(2, 6, 5)
    before = sampler.sample(2, 6, noise=noise).trajectories
    unet.output = nn.Conv1d(32, D, 1)
    wanted = EDMSampler(unet, SHORT, engine="reference").sample(2, 6, noise=noise).trajectories
    after = sampler.sample(2, 6, noise=noise).trajectories
    assert error(after, wanted) < 2e-5 and error(after, before) > 0.01


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_sample_on_their_own(copied):
    sampler = EDMSampler(make_unet(32), SHORT, dtype="float32")
    other = copied(sampler)
    noise = draw_noise(2, 6, 5)
    wanted = sampler.sample(2, 6, noise=noise).trajectories
    with torch.no_grad():
        sampler.denoiser.output.bias.add_(1.0)
    assert torch.equal(other.sample(2, 6, noise=noise).trajectories, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("norm_over", NORM_OVER)
@pytest.mark.parametrize("dtype", ["float32", "tf32", "bfloat16"])
def test_on_a_gpu(dtype, norm_over):
    unet = make_unet(64, 3, norm_over=norm_over).cuda()
    x = torch.randn(9, 17, D, device="cuda")
    tolerance = {"float32": 2e-5, "tf32": 1e-2, "bfloat16": 5e-2}[dtype]
    packed = PackedDenoiser(unet, SHORT, dtype)
    for _ in range(2):  # the second time other weights at the addresses of the graph
        packed.refresh()
        exact = PlainDenoiser(copy.deepcopy(unet).double(), SHORT)
        for sigma in NoiseLevels.of(SHORT).sigma[:-1]:
            noisy = x * math.sqrt(sigma**2 + 1)
            with torch.no_grad():
                assert error(packed(noisy, sigma), exact(noisy.double(), sigma)) < tolerance
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter.mul_(1.1)


def test_algorithm_2():
    """The chain with Euler's steps from the churned trajectory, written out."""
    config = EDMConfig.paper(num_inference_steps=6, s_churn=3.0)
    unet, noise = make_unet(32).double(), draw_noise(3, 6, 6)
    levels = NoiseLevels.of(config)

    def slope(x, sigma):
        level = torch.full((3,), sigma, dtype=torch.float64)
        return (x - denoise(unet, x, level, 1.0)) / sigma

    with torch.no_grad():
        x = levels.sigma[0] * noise.initial.double()
        for i in range(6):
            t, t_next = levels.sigma[i], levels.sigma[i + 1]
            gamma = min(3.0 / 6, math.sqrt(2) - 1) if 0.05 <= t <= 50 else 0.0
            t_hat = t + gamma * t
            x_hat = x + math.sqrt(t_hat**2 - t**2) * 1.003 * noise.steps[i].double()
            d = slope(x_hat, t_hat)
            x = x_hat + (t_next - t_hat) * d
            if t_next:
                x = x_hat + (t_next - t_hat) * (d + slope(x, t_next)) / 2
    got = EDMSampler(unet.float(), config, "reference").sample(3, 6, noise=noise).trajectories
    assert error(got, x) < 1e-5
    released = replace(config, euler_from="trajectory")
    other = EDMSampler(unet, released, "reference").sample(3, 6, noise=noise).trajectories
    assert error(other, x) > 1e-3


@pytest.mark.parametrize("std", [0.5, 2.0])
def test_samples_have_the_variance_of_the_data(std):
    config = EDMConfig.paper(num_inference_steps=80, s_noise=1.0, s_churn=20.0)
    sampler = EDMSampler(GaussianNetwork(std), config)
    samples = sampler.sample(2000, 3, torch.Generator().manual_seed(0)).trajectories
    assert abs(samples.std().item() / std - 1) < 0.03
    assert abs(samples.mean().item()) < 0.03 * std


def test_evaluations_and_guidance_once_per_step():
    network, steps = GaussianNetwork(), []

    def guidance(x, step):
        steps.append(step)
        kept = x.clone()
        clean = step.denoise(x)
        assert torch.equal(x, kept) and torch.equal(
            clean, denoise(network, x, x.new_full((2,), levels.sigma[step.index]), 1.0)
        )
        return x + 1.0

    levels = NoiseLevels.of(SHORT)
    sampler = EDMSampler(network, SHORT)
    sampler.sample(2, 4)
    assert len(network.calls) == 2 * 5 - 1
    first_order = EDMSampler(network, replace(SHORT, second_order=False))
    network.calls.clear()
    first_order.sample(2, 4)
    assert network.calls == pytest.approx(levels.sigma_hat, rel=1e-5)
    noise = draw_noise(2, 4, 5)
    plain = sampler.sample(2, 4, noise=noise).trajectories
    moved = sampler.sample(2, 4, noise=noise, guidance=guidance).trajectories
    assert [step.index for step in steps] == list(range(5))
    assert steps[0].levels == levels
    assert not torch.equal(plain, moved)


@pytest.mark.parametrize("second_order", [True, False])
def test_known_entries(second_order):
    """They hold at every Euler point and at the end; the first evaluation of a step sees noise."""
    config = replace(SHORT, second_order=second_order)
    network, seen = GaussianNetwork(), []
    mask = torch.zeros(6, D, dtype=torch.bool)
    mask[0, :S] = True
    mask[:, S : S + A] = True
    values = torch.randn(4, 6, D, generator=torch.Generator().manual_seed(1))
    conditions = FixedEntries(mask, values)

    def watched(x, sigma):
        seen.append((sigma, x))
        return denoise(network, x, x.new_full((4,), sigma), 1.0)

    noise = draw_noise(4, 6, 5)
    moved = lambda x, step: x + 1.0  # noqa: E731
    end, chain = heun_sample(
        noise.initial, noise.steps, config, watched, moved, conditions, return_chain=True
    )
    levels = NoiseLevels.of(config)
    for x in (end, *chain):
        assert torch.equal(x[:, mask], values[:, mask])
    every = 2 if second_order else 1
    first, others = seen[::every], [] if every == 1 else seen[1::2]
    assert len(first) == 5
    for (_, x), gamma in zip(first, levels.gamma, strict=True):
        assert torch.equal(x[:, mask], values[:, mask]) == (gamma == 0)
    assert all(torch.equal(x[:, mask], values[:, mask]) for _, x in others)
    sampled = EDMSampler(network, config).sample(4, 6, noise=noise, conditions=conditions)
    assert torch.equal(sampled.trajectories[:, mask], values[:, mask])
    assert not torch.equal(sampled.trajectories[:, ~mask], values[:, ~mask])


def test_noise_that_is_not_needed_is_not_drawn():
    config = replace(SHORT, s_churn=0.0)
    sampler = EDMSampler(GaussianNetwork(), config)
    generator = torch.Generator().manual_seed(0)
    first = sampler.sample(2, 4, generator).trajectories
    wanted = torch.Generator().manual_seed(0)
    noise = EDMNoise(torch.randn(2, 4, D, generator=wanted), torch.zeros(5, 2, 4, D))
    assert torch.equal(generator.get_state(), wanted.get_state())
    assert torch.equal(first, sampler.sample(2, 4, noise=noise).trajectories)


def test_threads_may_share_a_sampler():
    sampler = EDMSampler(make_unet(32), SHORT)
    noises = [draw_noise(3, 6, 5, seed) for seed in range(4)]
    wanted = [sampler.sample(3, 6, noise=noise).trajectories for noise in noises]
    got = [None] * 4

    def work(i):
        got[i] = sampler.sample(3, 6, noise=noises[i]).trajectories

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_results_carry_no_gradient_and_ignore_autocast():
    sampler = EDMSampler(make_unet(32), SHORT, "reference")
    noise = draw_noise(2, 6, 5)
    wanted = sampler.sample(2, 6, noise=noise).trajectories
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad():
        got = sampler.sample(2, 6, noise=noise).trajectories
    assert torch.equal(got, wanted) and not got.requires_grad and not got.is_inference()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engine": "triton"}, "engine must be one of .*'torch'.*, got 'triton'"),
        ({"config": 3}, "config must be an EDMConfig, got 3"),
        ({"denoiser": print}, "denoiser must be a torch.nn.Module, got builtin"),
        ({"engine": "reference", "dtype": "bfloat16"}, "dtype must be 'auto' or one of"),
        ({"denoiser": GaussianNetwork(), "dtype": "bfloat16"}, "a denoiser that is a Gaussian"),
        ({"dtype": "tf32"}, r"dtype must be .*'float32', 'bfloat16'.* on 'cpu', got 'tf32'"),
        ({"dtype": "float16"}, "got 'float16'"),
        ({"device": "meta"}, "device must be the modules' 'cpu'"),
    ],
)
def test_what_a_sampler_cannot_be_made_of(arguments, message):
    with pytest.raises(InputError, match=message):
        EDMSampler(**({"denoiser": make_unet(), "config": SHORT} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_trajectories": 0}, "num_trajectories must be an integer of at least 1, got 0"),
        ({"length": 1}, "length must be an integer of at least 2, got 1"),
        ({"noise": draw_noise(3, 6, 5)}, r"noise.initial must be of shape \(2, 6, 7\), got"),
        ({"noise": draw_noise(2, 6, 4)}, r"noise.steps must be of shape \(5, 2, 6, 7\), got"),
        ({"noise": 3}, "noise must be an EDMNoise, got int"),
        ({"generator": 3}, "generator must be a torch.Generator, got 3"),
        (
            {"noise": EDMNoise(torch.full((2, 6, D), math.nan), torch.zeros(5, 2, 6, D))},
            "noise.initial must be finite",
        ),
        (
            {"conditions": FixedEntries(torch.ones(5, D, dtype=torch.bool), torch.zeros(6, D))},
            r"must be a bool mask and values that broadcast to \(2, 6, 7\)",
        ),
        (
            {"conditions": FixedEntries(torch.ones(6, D), torch.zeros(6, D))},
            "must be a bool mask .* of torch.float32",
        ),
    ],
)
def test_what_cannot_be_sampled(arguments, message):
    sampler = EDMSampler(make_unet(), SHORT)
    with pytest.raises(InputError, match=message):
        sampler.sample(**({"num_trajectories": 2, "length": 6} | arguments))


def test_a_foreign_network_needs_the_size_of_a_row():
    sampler = EDMSampler(nn.Linear(D, D), SHORT)
    with pytest.raises(InputError, match="attribute trajectory_dim"):
        sampler.sample(2, 6)


def test_the_position_of_a_graph_is_a_tensor():
    """What a CUDA graph captures reads the noise level from a tensor instead of a number."""
    unet = make_unet(32)
    packed = packed_unet.PackedTemporalUNet(unet, torch.linspace(-1, 1, 4), torch.float32)
    packed.refresh()
    x = torch.randn(3, 8, D, generator=torch.Generator().manual_seed(0))
    workspace = packed._workspace(3, 8)
    with torch.no_grad():
        for index in (2, 0, 3):
            wanted = packed(x, index)
            assert torch.equal(packed._evaluate(x, torch.tensor([index]), workspace), wanted)
            assert error(wanted, unet(x, packed.c_noise[index].expand(3))) < 1e-5


@pytest.mark.slow
def test_what_is_learnt_is_sampled():
    """Trajectories s' = 0.8 s + 0.5 a of a linear system, from training to samples."""
    generator = torch.Generator().manual_seed(0)

    def windows(count, length=8):
        s, rows = torch.randn(count, S, generator=generator), []
        for _ in range(length):
            a = torch.randn(count, A, generator=generator)
            rows.append(torch.cat([s, a, s.sum(1, keepdim=True) / 2, torch.zeros(count, 1)], 1))
            s = 0.8 * s
            s[:, :A] += 0.5 * a
        return torch.stack(rows, 1)

    def dynamics_error(x):
        predicted = 0.8 * x[:, :-1, :S]
        predicted[..., :A] += 0.5 * x[:, :-1, S : S + A]
        return (x[:, 1:, :S] - predicted).square().mean().sqrt().item()

    unet = TemporalUNet(S, A, 32, 2, generator)
    config = EDMTrainingConfig(ema_interval=1, ema_decay=0.98)
    trainer = EDMTrainer(unet, 600, config)
    for _ in range(600):
        metrics = trainer.update(windows(64), generator)
    assert metrics["loss"] < 0.7  # 1 where only the noise level is known
    config = EDMConfig.paper(num_inference_steps=20)
    data = windows(512)
    samples = EDMSampler(trainer.ema_model, config).sample(512, 8, generator).trajectories
    assert dynamics_error(data) < 1e-6
    shuffled = samples[:, torch.randperm(8, generator=generator)]
    assert dynamics_error(samples) < 0.7 * dynamics_error(shuffled)
    actions = slice(S, S + A)
    assert torch.allclose(samples.std((0, 1))[actions], data.std((0, 1))[actions], rtol=0.15)
    assert torch.allclose(samples.mean((0, 1)), data.mean((0, 1)), atol=0.15)
