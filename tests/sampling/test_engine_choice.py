"""Engine "auto", devices and dtypes, and the cache of captured graphs."""

import warnings

import pytest
import torch

import polygrad_fast as pg
from polygrad_fast.sampling import graphs, sampler
from polygrad_fast.sampling.components import SamplerComponents

S, A, H = 3, 2, 4


class OnCuda:
    """Stands for components on a GPU."""

    device = torch.device("cuda")

    def __init__(self, denoiser=None):
        self.denoiser = denoiser if denoiser is not None else pg.ResidualMLPDenoiser(S, A, H, 8, 1)


def make_parts():
    return {
        "denoiser": pg.ResidualMLPDenoiser(S, A, H, hidden_dim=8, num_layers=1),
        "policy": pg.GaussianPolicy(S, A, 8),
        "schedule": pg.NoiseSchedule.cosine(3),
        "normalizer": pg.Normalizer(S, A),
    }


def test_auto_is_torch_in_float32_on_a_cpu():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = pg.PolicyGuidedSampler(**make_parts())
    assert made.engine == "torch" and made._engine.dtype == "float32"


def test_auto_on_a_gpu_is_triton(monkeypatch):
    monkeypatch.setattr(sampler, "TritonEngine", lambda components, dtype: f"triton {dtype}")
    assert sampler._build_engine("auto", OnCuda(), "float16") == ("triton", "triton float16")


def test_auto_falls_back_with_one_warning_that_says_why(monkeypatch):
    def refuse(components, dtype):
        raise pg.InputError("no update_states here")

    monkeypatch.setattr(sampler, "TritonEngine", refuse)
    monkeypatch.setattr(sampler, "TorchEngine", lambda components, dtype: "torch engine")
    with pytest.warns(UserWarning, match="'auto' falls back to 'torch': no update_st") as caught:
        assert sampler._build_engine("auto", OnCuda(), "float32") == ("torch", "torch engine")
    assert len(caught) == 1
    with pytest.raises(pg.InputError, match="no update_states here"):
        sampler._build_engine("triton", OnCuda(), "float32")


def test_the_warning_names_the_line_that_made_the_sampler(monkeypatch):
    def on_cuda(*parts):
        components = SamplerComponents(*parts)
        object.__setattr__(components, "device", torch.device("cuda"))
        return components

    def refuse(components, dtype):
        raise pg.InputError("not here")

    monkeypatch.setattr(sampler, "SamplerComponents", on_cuda)
    monkeypatch.setattr(sampler, "TritonEngine", refuse)
    monkeypatch.setattr(sampler, "TorchEngine", lambda components, dtype: dtype)
    with pytest.warns(UserWarning, match="not here") as caught:
        made = pg.PolicyGuidedSampler(**make_parts())
    assert caught[0].filename == __file__
    assert (made.engine, made._engine) == ("torch", "float16")


@pytest.mark.parametrize(
    "asked, engine, foldable, wanted",
    [
        ("auto", "auto", True, "float16"),
        ("auto", "torch", True, "float16"),
        ("auto", "auto", False, "float32"),
        ("auto", "reference", True, "float32"),
        ("tf32", "auto", True, "tf32"),
    ],
)
def test_dtype_on_a_gpu(asked, engine, foldable, wanted):
    denoiser = None if foldable else torch.nn.Linear(1, 1)
    assert sampler._resolve_dtype(asked, engine, OnCuda(denoiser)) == wanted


def test_modules_on_different_devices_are_named():
    parts = make_parts()
    parts["policy"].to("meta")
    with pytest.raises(pg.InputError, match=r"got GaussianPolicy\.\S+ on meta and .* on cpu"):
        pg.PolicyGuidedSampler(**parts)


@pytest.mark.parametrize(
    "device, message", [("gpu", "got 'gpu'"), ("meta", "modules' 'cpu' .*, got 'meta'")]
)
def test_devices_that_cannot_be(device, message):
    with pytest.raises(pg.InputError, match=message):
        pg.PolicyGuidedSampler(**make_parts(), device=device)


@pytest.mark.parametrize("engine", ["reference", "torch"])
def test_an_ambient_autocast_has_no_effect(engine):
    made = pg.PolicyGuidedSampler(**make_parts(), engine=engine)
    s0 = torch.randn(5, S)
    wanted = made.sample(s0, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = made.sample(s0, generator=torch.Generator().manual_seed(0))
    assert torch.equal(got.observations, wanted.observations)
    assert got.actions.dtype == torch.float32 and torch.equal(got.actions, wanted.actions)


class FakeCapture:
    made = 0

    def __init__(self, function, inputs):
        FakeCapture.made += 1
        self.function = function

    def __call__(self, *inputs):
        return self.function(*inputs)


def test_graph_cache_keeps_the_most_recently_used(monkeypatch):
    monkeypatch.setattr(graphs, "CapturedFunction", FakeCapture)
    monkeypatch.setattr(FakeCapture, "made", 0)
    cache = graphs.GraphCache(max_entries=2)

    def call(size):
        return cache("double", lambda x: (2 * x,), (torch.ones(size),))[0]

    for size, made in ((1, 1), (2, 2), (1, 2), (3, 3), (1, 3), (2, 4)):
        assert torch.equal(call(size), torch.full((size,), 2.0))
        assert FakeCapture.made == made, size


def test_graph_cache_makes_room_once(monkeypatch):
    attempts = []

    class Greedy(FakeCapture):
        def __init__(self, function, inputs):
            attempts.append(len(cache._entries))
            if len(cache._entries) > 0:
                raise torch.OutOfMemoryError("full")
            super().__init__(function, inputs)

    monkeypatch.setattr(graphs, "CapturedFunction", Greedy)
    cache = graphs.GraphCache()
    for size in (1, 2):
        assert cache("same", lambda x: (x,), (torch.ones(size),))[0].shape == (size,)
    assert attempts == [0, 1, 0]
