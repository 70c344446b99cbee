"""The stand-in for a CUDA device does what a device does where our code could go wrong."""

import copy

import fake_cuda
import pytest
import torch


@pytest.fixture
def gpu():
    with fake_cuda.installed() as gpu:
        yield gpu


def pinned_copy():
    return torch.empty(3).pin_memory()


SYNCS = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x[0]),
    "bool": lambda x: bool((x > 0).all()),
    "tolist": lambda x: x.tolist(),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "indices on the host": lambda x: x[torch.tensor([1])],
    "to": lambda x: x.to("cpu"),
    "cpu": lambda x: x.cpu(),
    "copy_": lambda x: torch.empty(3).copy_(x),
    "blocking copy to pinned memory": lambda x: pinned_copy().copy_(x),
    "pageable memory to the device": lambda x: torch.ones(3).to("cuda", non_blocking=True),
    "copy_ from the host": lambda x: x.copy_(torch.ones(3)),
    "tensor": lambda x: torch.tensor([1.0], device="cuda"),
    "as_tensor": lambda x: torch.as_tensor(1.0, device="cuda"),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "event": lambda x: torch.cuda.Event().synchronize(),
    "clip_grad_norm": lambda x: float(torch.nn.utils.get_total_norm([x])),
}


@pytest.mark.parametrize("name", SYNCS)
def test_the_host_waits(gpu, name):
    x = torch.ones(3, device="cuda")
    with gpu.without_syncs(), pytest.raises(fake_cuda.HostSync):
        SYNCS[name](x)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(fake_cuda.HostSync, match="during the capture"), torch.cuda.graph(graph):
        SYNCS[name](x)
    assert not gpu.syncs
    SYNCS[name](x)
    assert gpu.syncs.total() == 1


def test_the_host_does_not_wait(gpu):
    x = torch.ones(3, device="cuda")
    source = torch.arange(3.0).pin_memory()
    with gpu.without_syncs() as launches:
        x[0] = 2.0
        x[x > 1] = 3.0
        x += torch.tensor(1.0)  # a number, passed with the launch
        back = pinned_copy().copy_(x, non_blocking=True)
        there = source.to("cuda", non_blocking=True)
        x.masked_fill_(x > 3, 0.0)
        torch.full((), 0.5, device="cuda") + x.mean()
    assert back.tolist() == [4.0, 2.0, 2.0] and there.tolist() == [0.0, 1.0, 2.0]
    assert launches["masked_fill_"] == launches["full"] == 1
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()


def test_devices(gpu):
    x = torch.ones(3, device="cuda")
    assert x.device == torch.device("cuda:0") != torch.device("cuda")
    assert x.is_cuda and not x.is_cpu and not torch.ones(3).is_cuda
    for made in (x[1:], x * 2, x.double(), torch.zeros_like(x), x.new_ones(2), x.to("cuda:0")):
        assert made.device == x.device
    assert x.to("cuda") is x and x.cpu().device.type == "cpu"
    with pytest.raises(RuntimeError, match="expected all tensors on cuda:0"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.ones(3, device="cuda:1")
    generator = torch.Generator("cuda").manual_seed(0)
    assert isinstance(generator, torch.Generator) and generator.device.type == "cuda"
    assert torch.randn(3, generator=generator, device="cuda").is_cuda
    with pytest.raises(RuntimeError, match="expected a generator on cuda:0"):
        torch.randn(3, generator=torch.Generator(), device="cuda")


def test_modules_and_optimizers(gpu):
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2)
    wanted, weight = copy.deepcopy(module), module.weight
    assert module.to("cuda").weight is weight and weight.is_cuda
    copied = copy.deepcopy(module)
    assert copied.weight.is_cuda and copied.weight.data_ptr() != weight.data_ptr()
    x = torch.randn(5, 3)
    for owner, inputs in ((module, x.to("cuda")), (wanted, x)):
        optimizer = torch.optim.Adam(owner.parameters(), lr=0.1, capturable=owner is module)
        owner(inputs).square().mean().backward()
        optimizer.step()
    assert weight.grad.is_cuda
    torch.testing.assert_close(weight.detach().cpu(), wanted.weight.detach())
    assert gpu.launches["_foreach_addcdiv_"] == 1, "one launch for all weights, as on a GPU"


def test_graphs(gpu):
    weight, bias, number = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda"), 2
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = torch.relu(weight * number + bias)
        out[0] = out[1] + 1
        drawn = torch.randn(4, device="cuda")
        fresh = torch.zeros(3, device="cuda")
        fresh.add_(weight)
    graph.replay()
    before = drawn.clone()
    weight.fill_(5.0)
    number = 7  # the graph keeps the number it was captured with
    launches = gpu.launches.copy()
    graph.replay()
    assert out.tolist() == [11.0, 10.0, 10.0] and fresh.tolist() == [5.0] * 3
    assert not torch.equal(drawn, before)
    assert (gpu.launches - launches)["graph replay"] == 1
    assert graph.launches["mul"] == 1 and graph.launches.total() == 8
    with pytest.raises(RuntimeError, match="registered with the graph"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.randn(3, generator=torch.Generator("cuda"), device="cuda")


def test_a_capture_changes_nothing(gpu):
    """Neither what it writes over nor the generators; its replay does."""
    weight = torch.ones(3, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    state, default = generator.get_state(), torch.get_rng_state()
    optimizer = torch.optim.Adam([torch.nn.Parameter(weight)], fused=True, capturable=True)
    parameter = optimizer.param_groups[0]["params"][0]
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = weight.clone()
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        optimizer.step()
        drawn = torch.randn(3, generator=generator, device="cuda") + torch.randn(3, device="cuda")
    assert torch.equal(weight, before) and torch.equal(parameter, before)
    assert torch.equal(generator.get_state(), state) and torch.equal(torch.get_rng_state(), default)
    graph.replay()
    assert not torch.equal(parameter, before) and not torch.equal(generator.get_state(), state)
    first = drawn.clone()
    graph.replay()
    assert not torch.equal(first, drawn)


def test_nothing_stays():
    available, generator = torch.cuda.is_available(), torch.Generator
    with fake_cuda.installed():
        kept = torch.ones(3, device="cuda")
        assert torch.cuda.is_available()
    assert torch.cuda.is_available() == available and torch.Generator is generator
    assert kept.device.type == "cpu"
