"""The U-Net over time, held against a literal computation row by row in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polygrad_fast.denoisers.temporal_unet import TemporalUNet
from polygrad_fast.errors import InputError

S, A = 3, 2
D = S + A + 2


def make_unet(features=24, num_levels=2, seed=0, norm_over="row") -> TemporalUNet:
    """Return a network whose biases and scales matter."""
    generator = torch.Generator().manual_seed(seed)
    unet = TemporalUNet(S, A, features, num_levels, generator, norm_over)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return unet


def literal(unet: TemporalUNet, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Return F_theta of one trajectory, [L, D] and a scalar, in float64."""
    w = {name: value.double() for name, value in unet.state_dict().items()}

    def linear(x, name):
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    def convolution(rows, name, before):
        weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
        out = []
        for j in range(len(rows)):
            total = bias.clone()
            for k in range(weight.shape[2]):
                if 0 <= j + k - before < len(rows):
                    total += weight[:, :, k] @ rows[j + k - before]
            out.append(total)
        return torch.stack(out)

    def norm_relu(rows, name):
        groups = rows.view(len(rows), 8, -1)
        over = (0, 2) if unet.encoder[0].norm_1.over == "window" else (2,)
        centred = groups - groups.mean(over, keepdim=True)
        scaled = centred / (centred.square().mean(over, keepdim=True) + 1e-6).sqrt()
        return (scaled.flatten(1) * w[f"{name}.weight"] + w[f"{name}.bias"]).clamp(min=0)

    h = unet.features // 8
    frequencies = torch.exp(-torch.arange(h) * math.log(10000) / (h - 1)).double()
    e = torch.cat([torch.sin(c.double() * frequencies), torch.cos(c.double() * frequencies)])
    silu = torch.nn.functional.silu
    s = silu(linear(silu(linear(e, "noise_embedding.1")), "noise_embedding.3"))

    x, skips = x.double(), []
    for i in range(unet.num_levels):
        name = f"encoder.{i}"
        if i:
            x = torch.stack([torch.maximum(*x[2 * j : 2 * j + 2]) for j in range(len(x) // 2)])
        x = convolution(x, f"{name}.conv_1", 1) + linear(s, f"{name}.condition")
        x = norm_relu(x, f"{name}.norm_1")
        x = norm_relu(convolution(x, f"{name}.conv_2", 1), f"{name}.norm_2")
        skips.append(x)
    for j in range(unet.num_levels - 1):
        name, skip = f"decoder.{j}", skips[unet.num_levels - 2 - j]
        length = len(skip)
        x = torch.stack([x[math.floor((r + 0.5) * len(x) / length)] for r in range(length)])
        x = convolution(x, f"{name}.conv_1", 0) + linear(s, f"{name}.condition")
        x = norm_relu(x, f"{name}.norm_1")
        x = torch.cat([x, skip], dim=1)
        x = norm_relu(convolution(x, f"{name}.conv_2", 1), f"{name}.norm_2")
        x = norm_relu(convolution(x, f"{name}.conv_3", 1), f"{name}.norm_3")
    return convolution(x, "output", 0)


@settings(max_examples=15, deadline=None)
@given(
    features=st.sampled_from([24, 32, 40]),
    num_levels=st.integers(1, 4),
    extra=st.integers(0, 9),
    batch=st.integers(0, 3),
    norm_over=st.sampled_from(["row", "window"]),
)
def test_every_row_is_computed_as_specified(features, num_levels, extra, batch, norm_over):
    unet = make_unet(features, num_levels, norm_over=norm_over)
    length = unet.min_length + extra
    generator = torch.Generator().manual_seed(extra)
    x = torch.randn(batch, length, D, generator=generator)
    c = torch.randn(batch, generator=generator)
    with torch.no_grad():
        got = unet(x, c)
    assert got.shape == (batch, length, D)
    for b in range(batch):
        wanted = literal(unet, x[b], c[b])
        assert (got[b] - wanted).norm() < 1e-4 * wanted.norm()


def test_kernels_start_lecun_normal_and_biases_at_zero():
    unet = TemporalUNet(S, A, 128, 3, torch.Generator().manual_seed(3))
    for name, parameter in unet.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all()
        elif "norm_" in name:
            assert (parameter == 1).all()
        else:
            std = 1 / math.sqrt(parameter[0].numel())
            count = parameter.numel()
            assert abs(parameter.std().item() / std - 1) < 5 / math.sqrt(count), name
            assert parameter.abs().max() <= 2 * std / 0.87962566
            assert parameter.abs().max() > 1.9 * std or count < 1000


def test_a_generator_gives_the_weights():
    first, again, other = (
        TemporalUNet(S, A, 24, 2, torch.Generator().manual_seed(seed)).output.weight
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((S, A, 20, 3), "features must be a multiple of 8, got 20"),
        ((S, A, 8, 3), "features must be an integer of at least 16, got 8"),
        ((S, A, 24, 0), "num_levels must be an integer of at least 1, got 0"),
        (
            (S, A, 24, 1, None, "batch"),
            r"norm_over must be one of \['row', 'window'\], got 'batch'",
        ),
        ((0, A, 24, 1), "observation_dim must be an integer of at least 1, got 0"),
    ],
)
def test_sizes_out_of_range(arguments, message):
    with pytest.raises(InputError, match=message):
        TemporalUNet(*arguments)


@pytest.mark.parametrize(
    ("shape", "levels", "message"),
    [
        ((2, 3, D), 2, r"\[B, L, 7\] with L at least 4, got shape \(2, 3, 7\)"),
        ((2, 8, D + 1), 2, r"\[B, L, 7\] with L at least 4, got shape \(2, 8, 8\)"),
        ((8, D), 8, r"\[B, L, 7\] with L at least 4, got shape \(8, 7\)"),
        ((2, 8, D), 3, r"noise_condition must be of shape \(2,\) .*, got \(3,\)"),
    ],
)
def test_wrong_inputs(shape, levels, message):
    with pytest.raises(InputError, match=message):
        make_unet(num_levels=3)(torch.zeros(shape), torch.zeros(levels))
