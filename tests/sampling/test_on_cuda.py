"""Engine "torch" on a CUDA device that is imitated: construction, graphs, host synchronization,
launches."""

import math

import fake_cuda
import pytest
import torch
import torch.nn.functional as F
from fake_cuda_runtime import PROPERTIES

import polygrad_fast as pg
from polygrad_fast.sampling import folded_networks
from polygrad_fast.sampling.folded_networks import FoldedResidualMLP, HeldTensors
from polygrad_fast.sampling.linear import LinearOps
from polygrad_fast.sampling.torch_step import row_parts

S, A, H, K, B = 3, 2, 4, 5, 6
UPDATES = ("score", "sample", "exact", "none")


@pytest.fixture
def gpu():
    with fake_cuda.installed() as gpu:
        yield gpu


def build(
    device, denoiser="residual_mlp", dtype="float32", engine="torch", num_layers=1, **options
):
    """Return a sampler whose modules were moved to the device, as users do it."""
    torch.manual_seed(0)
    networks = {
        "residual_mlp": lambda: pg.ResidualMLPDenoiser(S, A, H, 16, 2, num_train_timesteps=K),
        "transformer": lambda: pg.TransformerDenoiser(S, A, H, 12, num_layers, 2),
        "rollout": lambda: pg.RolloutDenoiser(S, A, H, 8, 1),
    }
    normalizer = pg.Normalizer.from_moments(
        observations=(torch.randn(S), torch.rand(S) + 0.5),
        actions=(0.1 * torch.randn(A), torch.rand(A) + 0.3),
    )
    modules = (networks[denoiser](), pg.GaussianPolicy(S, A, 8, 2, 0.5, 0.1))
    return pg.PolicyGuidedSampler(
        *(module.to(device) for module in modules),
        pg.NoiseSchedule.cosine(K),
        normalizer.to(device),
        pg.SamplerConfig.official(**options),
        engine=engine,
        dtype=dtype,
        device=device,
        action_bounds=(-1.0, 1.0),
    )


def draw_noise(device):
    generator = torch.Generator().manual_seed(1)
    shapes = ((B, H, S + 2), (B, H, A), (K, B, H, S + 2), (K, B, H, A))
    return pg.SampleNoise(*(torch.randn(s, generator=generator).to(device) for s in shapes))


@pytest.mark.parametrize("engine", ["torch", "reference"])
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda")])
def test_samplers_on_a_device_without_an_index(gpu, device, engine):
    sampler = build(device, engine=engine)
    assert sampler.components.device == torch.device("cuda:0")
    batch = sampler.sample(torch.zeros(B, S, device=device))
    assert batch.actions.device == torch.device("cuda:0")
    assert sampler.sample(torch.zeros(B, S)).actions.is_cuda, "observations from the host"


@pytest.mark.parametrize("denoiser", ["residual_mlp", "transformer"])
@pytest.mark.parametrize("update", UPDATES)
def test_replays_do_not_wait_for_the_host(gpu, denoiser, update):
    """Neither with a guidance scale on the host nor on the device."""
    sampler = build("cuda", denoiser, action_update=update, denoiser_actions="clipped")
    s0, generator = torch.randn(B, S, device="cuda"), torch.Generator("cuda")
    for scale in (0.05, torch.tensor(0.05, device="cuda")):
        engine = sampler._engine
        first = engine.sample(s0, scale, generator, None, True)
        captured = len(gpu.graphs)
        with gpu.without_syncs() as launches:
            second = engine.sample(s0, scale, generator, None, True)
        assert launches["graph replay"] == 1 and len(gpu.graphs) == captured
        assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize("denoiser", ["residual_mlp", "transformer"])
@pytest.mark.parametrize("update", UPDATES)
def test_the_graph_computes_what_a_cpu_does(gpu, denoiser, update):
    """Also after weights, moments and the guidance scale have changed."""
    samplers = [build(device, denoiser, action_update=update) for device in ("cuda", "cpu")]
    for scale in (0.05, 0.1):
        results = []
        for sampler in samplers:
            device = sampler.components.device
            s0 = torch.randn(B, S, generator=torch.Generator().manual_seed(0)).to(device)
            results.append(sampler.sample(s0, scale, noise=draw_noise(device)))
            with torch.no_grad():
                for module in (sampler.components.denoiser, sampler.components.policy):
                    for parameter in module.parameters():
                        parameter.mul_(1.1)
            sampler.components.normalizer.observations_mean.add_(0.2)
        for name in ("observations", "actions", "rewards"):
            got, wanted = (getattr(result, name).cpu() for result in results)
            torch.testing.assert_close(got, wanted, rtol=2e-4, atol=2e-4)
    assert len(gpu.graphs) == 1


def test_a_rollout_that_settles_is_one_graph(gpu):
    """It waits for nothing and computes what a CPU does, each step of the horizon once."""
    options = {"action_update": "exact", "scale_actions": False, "clip_state_change": None}
    on_gpu, on_cpu = (build(device, "rollout", **options) for device in ("cuda", "cpu"))
    assert on_gpu._engine.settles
    s0 = torch.randn(B, S, generator=torch.Generator().manual_seed(0))
    wanted = on_cpu.sample(s0, noise=draw_noise("cpu"))
    given, noise = s0.to("cuda"), draw_noise("cuda")
    on_gpu.sample(given, noise=noise)  # captures
    s0_norm = on_gpu.components.normalizer.normalize(given, "observations")
    with gpu.without_syncs() as launches:
        on_gpu._engine.sample(s0_norm, 0.005, None, noise, False)
    assert launches["graph replay"] == 1 and len(gpu.graphs) == 1
    got = on_gpu.sample(given, noise=noise)
    for name in ("observations", "actions", "rewards"):
        pair = getattr(got, name).cpu(), getattr(wanted, name)
        torch.testing.assert_close(*pair, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("update", UPDATES)
def test_normals_are_drawn_in_the_loop(gpu, update):
    """Step by step and in the reference's order, from the caller's generator, also in the call that
    captures; a sample holds no normals but those of a step."""
    s0 = torch.zeros(B, S, device="cuda")
    torch_sampler, reference = (
        build("cuda", engine=engine, action_update=update) for engine in ("torch", "reference")
    )
    for generator in (None, torch.Generator("cuda")) * 2:  # the first captures
        source = generator or torch.cuda.default_generators[0]
        state = source.get_state()
        got = torch_sampler.sample(s0, generator=generator)
        after = source.get_state()
        source.set_state(state)
        wanted = reference.sample(s0, generator=generator)
        assert torch.equal(source.get_state(), after)
        torch.testing.assert_close(got.actions.cpu(), wanted.actions.cpu(), rtol=2e-4, atol=2e-4)
    assert len(gpu.graphs) == 1
    (captured,) = torch_sampler._engine._graphs._entries.values()
    assert [tensor.shape for tensor in captured.inputs] == [(B, S)]


@pytest.mark.parametrize("dtype", ["float32", "tf32", "float16", "bfloat16"])
def test_launches_of_a_step(gpu, dtype):
    """What one diffusion step costs in launches, and the refresh before the graph."""
    sampler = build("cuda", dtype=dtype)
    s0 = torch.randn(B, S, device="cuda")
    sampler.sample(s0)
    half = dtype in ("float16", "bfloat16")  # the prediction is cast
    assert gpu.graphs[-1].launches.total() <= (39 + half) * K + 10
    with gpu.without_syncs() as launches:
        sampler._engine.sample(s0, 0.05, None, None, False)
    assert launches.total() <= 79


def test_rows_by_parts_that_stay_in_the_cache(gpu, monkeypatch):
    """Two at a time here: the same trajectories, by as many products more and no other normals."""
    monkeypatch.setattr(folded_networks, "ROWS_OF_A_WAVE", 1)
    results, launches = [], []
    for cache in (PROPERTIES.L2_cache_size, 2 * 2 * 3 * 16 * 4):
        monkeypatch.setattr(PROPERTIES, "L2_cache_size", cache)
        sampler = build("cuda")
        s0 = torch.randn(B, S, generator=torch.Generator().manual_seed(0)).to("cuda")
        generator = torch.Generator("cuda").manual_seed(1)
        results.append(sampler.sample(s0, generator=generator))
        launches.append(gpu.graphs[-1].launches)
    for name in ("observations", "actions", "rewards"):
        whole, parts = (getattr(result, name).cpu() for result in results)
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    layers = 2 + 2
    assert launches[1]["addmm"] - launches[0]["addmm"] == (B // 2 - 1) * layers * K
    assert launches[1]["randn"] == launches[0]["randn"]


@pytest.mark.parametrize(
    "width, dtype, batch, parts",
    [
        (1024, torch.float16, 1024, 1),
        (1024, torch.float16, 16384, 4),
        (1024, torch.float32, 16384, 8),
        (2048, torch.float16, 1024, 1),
        (2048, torch.float32, 16384, 8),  # no fewer rows than occupy the device
        (128, torch.float32, 16384, 1),
    ],
)
def test_parts_on_a_device_of_50_megabytes(gpu, width, dtype, batch, parts):
    denoiser = pg.ResidualMLPDenoiser(S, A, H, width, 1)
    held = HeldTensors(torch.device("cuda", 0), fixed_addresses=True)
    folded = FoldedResidualMLP(denoiser, range(K), dtype, held, LinearOps(onednn=False))
    found = row_parts(batch, folded.rows_per_part, held.device, folded.rows_on_gpu)
    assert len(found) == parts and found[-1].stop == batch


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_transformer_copies_nothing_in_the_loop(gpu, dtype, monkeypatch):
    """Heads of odd widths are padded with their weights: a layer launches its products, norms,
    attention and sums, no padding and no copy. Attention gets widths that its fused kernels take,
    and what it returns is read as it lies."""
    attention, seen = F.scaled_dot_product_attention, []

    def noted(q, k, v, is_causal, scale):
        seen.append((q.shape, scale))
        out = attention(q, k, v, is_causal=is_causal, scale=scale)
        assert all(t.stride(-1) == 1 and t.stride(-2) % 8 == 0 for t in (q, k, v))
        return out

    layers = {}
    for num_layers in (1, 3):
        sampler = build("cuda", "transformer", dtype, num_layers=num_layers)
        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", noted)
            sampler.sample(torch.randn(B, S, device="cuda"))
        layers[num_layers] = gpu.graphs[-1].launches
    assert set(seen) == {((B, 2, H, 8), 1 / math.sqrt(6))}
    attending = "_scaled_dot_product_flash_attention_for_cpu"
    one = {"addmm": 4, "add_": 2, "native_layer_norm": 2, "gelu": 1, attending: 1}
    assert layers[3] - layers[1] == {name: 2 * K * times for name, times in one.items()}
