"""Engine "triton" on a CUDA device that is imitated, with its kernels in the interpreter: its graph
against eager launches on a CPU, host synchronization, launches."""

import dataclasses

import fake_cuda
import pytest
import torch

pytest.importorskip("triton")

import polygrad_fast as pg  # noqa: E402
from polygrad_fast.kernels import guided_step, precision  # noqa: E402
from polygrad_fast.sampling.triton_engine import TritonEngine  # noqa: E402

if torch.cuda.is_available():
    pytest.skip("the kernels are compiled here", allow_module_level=True)

S, A, H, K, B, LAYERS = 3, 2, 2, 2, 3, 1
DTYPES = ["float32", "tf32", "float16", "bfloat16"]


@pytest.fixture
def counted(monkeypatch):
    """A device whose kernels are counted only; the engine takes them for compiled ones."""
    monkeypatch.setattr(precision, "is_interpreted", lambda: False)
    with fake_cuda.installed(runs_kernels=False) as gpu:
        yield gpu


@pytest.fixture
def computed(monkeypatch):
    """A device whose kernels run in the interpreter."""
    monkeypatch.setattr(precision, "is_interpreted", lambda: False)
    monkeypatch.setattr(guided_step, "MANY_ROWS", 1)  # the engine's first step: it is slow
    with fake_cuda.installed() as gpu:
        yield gpu


def build(device, dtype="float32", engine="triton", conditioning="input", **options):
    torch.manual_seed(0)
    normalizer = pg.Normalizer.from_moments(
        observations=(torch.randn(S), torch.rand(S) + 0.5),
        actions=(0.1 * torch.randn(A), torch.rand(A) + 0.3),
    )
    denoiser = pg.ResidualMLPDenoiser(
        S, A, H, 16, LAYERS, step_conditioning=conditioning, num_train_timesteps=K
    )
    policy = pg.GaussianPolicy(S, A, 8, 2, 0.5, 0.1)
    return pg.PolicyGuidedSampler(
        denoiser.to(device),
        policy.to(device),
        pg.NoiseSchedule.cosine(K),
        normalizer.to(device),
        pg.SamplerConfig.official(**options),
        engine=engine,
        dtype=dtype,
        device=device,
    )


def draw_noise(device):
    generator = torch.Generator().manual_seed(1)
    shapes = ((B, H, S + 2), (B, H, A), (K, B, H, S + 2), (K, B, H, A))
    return pg.SampleNoise(*(torch.randn(s, generator=generator).to(device) for s in shapes))


def test_a_weight_that_is_replaced_is_captured_anew(counted):
    """And only then; one that is changed in place is not."""
    sampler = build("cuda")
    s0, weight = torch.zeros(B, S, device="cuda"), sampler.components.denoiser.output.weight
    sampler.sample(s0)
    weight.data.mul_(2)
    sampler.sample(s0)
    assert len(counted.graphs) == 1
    weight.data = weight.data.clone()
    sampler.sample(s0)
    assert len(counted.graphs) == 2


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda")])
def test_samplers_on_a_device_without_an_index(counted, device):
    sampler = build(device, engine="auto")
    assert sampler.engine == "triton"
    assert sampler.sample(torch.zeros(B, S, device=device)).actions.is_cuda


def test_components_on_a_device_without_an_index(counted):
    components = dataclasses.replace(build("cuda").components, device=torch.device("cuda"))
    assert components.device == torch.device("cuda:0")
    s0 = torch.zeros(B, S, device="cuda")
    assert TritonEngine(components).sample(s0, 0.05, None, None, False)[0].is_cuda


@pytest.mark.parametrize("conditioning, refreshes", [("input", 2), ("layer", 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_launches_of_a_sample(counted, dtype, conditioning, refreshes):
    """Per diffusion step one for each layer and one for all the rest, at most two for all weights
    and one for the start; the only other one fills the denoiser input's padding with zeros.
    No replay waits."""
    sampler = build("cuda", dtype, conditioning=conditioning)
    s0, generator = torch.zeros(B, S, device="cuda"), torch.Generator("cuda")
    scale = torch.tensor(0.05, device="cuda")
    sampler._engine.sample(s0, scale, generator, None, False)
    with counted.without_syncs() as launches:
        sampler._engine.sample(s0, scale, generator, None, False)
    assert launches["graph replay"] == 1 and launches.total() <= 7, "the rest are copies and a seed"
    graph = counted.graphs[-1].launches
    assert graph["_residual_mlp_layer_kernel"] == K * (LAYERS + 2)
    assert graph["_guided_step_kernel"] == K and graph["_initial_state_kernel"] == 1
    assert graph["_refresh_kernel"] == refreshes
    kernels = K * (LAYERS + 3) + 1 + refreshes
    assert graph.total() - kernels == graph["zeros"] == 1, "the denoiser input's padding"


def test_the_graph_computes_what_eager_launches_do(computed):
    """On a CPU; also after weights, moments and the guidance scale have changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "is_interpreted", lambda: True)
        on_cpu = build("cpu")
    on_cuda = build("cuda")
    for scale in (0.05, 0.1):
        results = []
        for sampler in (on_cuda, on_cpu):
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
            assert torch.equal(got, wanted), name
    assert len(computed.graphs) == 1
