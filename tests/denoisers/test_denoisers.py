import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import polygrad_fast as pg

examples = settings(max_examples=40, deadline=None)
S, A, H, K = 3, 2, 6, 8
KINDS = [
    (pg.ResidualMLPDenoiser, "input"),
    (pg.ResidualMLPDenoiser, "layer"),
    (pg.TransformerDenoiser, "input"),
    (pg.TransformerDenoiser, "learned"),
]


def build(kind, conditioning, s=S, a=A, h=H, **options):
    torch.manual_seed(0)
    options = {"hidden_dim": 16, "num_layers": 2, "num_train_timesteps": K} | options
    denoiser = kind(s, a, h, step_conditioning=conditioning, **options)
    for parameter in denoiser.parameters():  # away from the small start, where little is seen
        torch.nn.init.normal_(parameter, std=0.5)
    return denoiser


def inputs(batch, s=S, a=A, h=H, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, h, s + 2, generator=generator),
        torch.randn(batch, h, a, generator=generator),
        torch.randint(K, (batch,), generator=generator),
    )


@pytest.mark.parametrize("kind, conditioning", KINDS)
@examples
@given(st.integers(0, 7), st.integers(1, 6), st.integers(1, 4), st.integers(1, 12))
def test_output_has_the_trajectory_shape(kind, conditioning, batch, s, a, h):
    denoiser = build(kind, conditioning, s, a, h)
    prediction = denoiser(*inputs(batch, s, a, h))
    assert prediction.shape == (batch, h, s + 2)
    assert torch.isfinite(prediction).all()


@pytest.mark.parametrize("kind, conditioning", KINDS)
def test_every_input_matters_and_rows_are_independent(kind, conditioning):
    denoiser = build(kind, conditioning)
    trajectory, actions, timesteps = inputs(4)
    base = denoiser(trajectory, actions, timesteps)
    changed = [
        denoiser(trajectory + 1, actions, timesteps),
        denoiser(trajectory, actions + 1, timesteps),
        denoiser(trajectory, actions, (timesteps + 1) % K),
    ]
    for other in changed:
        assert ((other - base).abs().amax((1, 2)) > 1e-3).all()
    alone = torch.cat([denoiser(*(x[i : i + 1] for x in inputs(4))) for i in range(4)])
    torch.testing.assert_close(alone, base, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind, conditioning", KINDS)
def test_non_contiguous_inputs_give_the_same(kind, conditioning):
    denoiser = build(kind, conditioning)
    trajectory, actions, timesteps = inputs(3)
    strided = trajectory.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    assert torch.equal(
        denoiser(strided, actions.mT.contiguous().mT, timesteps),
        denoiser(trajectory, actions, timesteps),
    )


@pytest.mark.parametrize("kind, conditioning", KINDS)
def test_gradients_reach_every_parameter(kind, conditioning):
    denoiser = build(kind, conditioning)
    trajectory, actions, _ = inputs(K)
    denoiser(trajectory, actions, torch.arange(K)).square().sum().backward()
    for name, parameter in denoiser.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("conditioning", ["input", "learned"])
@pytest.mark.parametrize("t", range(H - 1))
def test_the_transformer_does_not_look_ahead(conditioning, t):
    denoiser = build(pg.TransformerDenoiser, conditioning)
    trajectory, actions, timesteps = inputs(3)
    before = denoiser(trajectory, actions, timesteps)
    trajectory[:, t + 1 :] = 1e3 * torch.randn_like(trajectory[:, t + 1 :])
    actions[:, t + 1 :] = -1e3
    after = denoiser(trajectory, actions, timesteps)
    torch.testing.assert_close(after[:, : t + 1], before[:, : t + 1], rtol=0, atol=1e-6)
    assert ((after - before)[:, t + 1 :].abs().amax((0, 2)) > 1e-2).all()


@pytest.mark.parametrize("conditioning", ["input", "learned"])
def test_the_transformer_looks_back_and_knows_the_position(conditioning):
    denoiser = build(pg.TransformerDenoiser, conditioning)
    trajectory, actions, timesteps = inputs(3)
    before = denoiser(trajectory, actions, timesteps)
    shifted = trajectory.clone()
    shifted[:, 0] += 1
    assert ((denoiser(shifted, actions, timesteps) - before)[:, 1:].abs().amax((0, 2)) > 1e-3).all()
    same = denoiser(
        trajectory[:, :1].expand(-1, H, -1), actions[:, :1].expand(-1, H, -1), timesteps
    )
    assert ((same[:, 1:] - same[:, :1]).abs().amax((0, 2)) > 1e-3).all()


def test_transformer_against_a_naive_float64_implementation():
    denoiser = build(pg.TransformerDenoiser, "learned", num_heads=2)
    trajectory, actions, timesteps = inputs(2)
    w = {name: value.double() for name, value in denoiser.state_dict().items()}

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = linear(torch.cat([trajectory, actions], -1).double(), "input")
    x = x + w["position_embedding.weight"] + w["step_mlp.weight"][timesteps][:, None]
    for layer in ("blocks.0", "blocks.1"):
        q, k, v = linear(norm(x, f"{layer}.norm_1"), f"{layer}.qkv").split(16, -1)
        heads = []
        for part in (slice(0, 8), slice(8, 16)):
            logits = q[..., part] @ k[..., part].mT / math.sqrt(8)
            logits = logits.masked_fill(torch.ones(H, H).triu(1).bool(), -torch.inf)
            heads.append(logits.softmax(-1) @ v[..., part])
        x = x + linear(torch.cat(heads, -1), f"{layer}.attention_output")
        h = linear(norm(x, f"{layer}.norm_2"), f"{layer}.mlp_input")
        h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
        x = x + linear(h, f"{layer}.mlp_output")
    wanted = linear(x, "output")
    got = denoiser(trajectory, actions, timesteps).double()
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_paper_layers_against_a_naive_float64_implementation():
    denoiser = build(pg.ResidualMLPDenoiser, "layer")
    trajectory, actions, timesteps = inputs(4)
    w = {name: value.double() for name, value in denoiser.state_dict().items()}
    x = torch.cat([trajectory, actions], -1).double().reshape(4, -1)
    x = x @ w["input.weight"].T + w["input.bias"]
    for layer in ("blocks.0", "blocks.1"):
        embedding = w[f"{layer}.step_embedding.weight"][timesteps]
        linear = x.clamp(min=0) @ w[f"{layer}.linear.weight"].T + w[f"{layer}.linear.bias"]
        x = linear + x + embedding
    wanted = (x.clamp(min=0) @ w["output.weight"].T + w["output.bias"]).reshape(4, H, S + 2)
    got = denoiser(trajectory, actions, timesteps).double()
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_widths_are_the_released_ones():
    narrow = pg.ResidualMLPDenoiser(S, A, H, hidden_dim=16)
    wide = pg.ResidualMLPDenoiser(17, 6, 10, hidden_dim=16)
    assert narrow.proj.weight.shape == (128, H * (S + 2 + A))
    assert wide.proj.weight.shape == (250, 250)
    assert "step_mlp.0.weights" in narrow.state_dict(), "the random frequencies must be saved"


@pytest.mark.parametrize("kind, conditioning", KINDS)
@pytest.mark.parametrize("name", ["trajectory", "actions", "timesteps"])
def test_wrong_shapes_name_got_and_wanted(kind, conditioning, name):
    denoiser = build(kind, conditioning)
    arguments = dict(zip(("trajectory", "actions", "timesteps"), inputs(4), strict=True))
    wanted = tuple(arguments[name].shape)
    wrong = [arguments[name].unsqueeze(0), arguments[name].squeeze()[..., :-1]]
    if name != "timesteps":
        wrong += [arguments[name][:, :-1], arguments[name].mT]
    for tensor in wrong:
        with pytest.raises(pg.InputError) as error:
            denoiser(**(arguments | {name: tensor}))
        message = str(error.value)
        assert str(tuple(tensor.shape)) in message
        if tensor.shape[0] == 4:
            assert name in message and str(wanted) in message


@pytest.mark.parametrize("kind, conditioning", KINDS)
@pytest.mark.parametrize("name", ["observation_dim", "action_dim", "horizon", "num_layers"])
@pytest.mark.parametrize("value", [0, -3])
def test_sizes_below_one_are_refused(kind, conditioning, name, value):
    sizes = {"observation_dim": S, "action_dim": A, "horizon": H, "hidden_dim": 16, "num_layers": 2}
    with pytest.raises(
        pg.InputError, match=f"{name} must be an integer of at least 1, got {value}"
    ):
        kind(**(sizes | {name: value}), step_conditioning=conditioning)


@pytest.mark.parametrize("kind, other", [KINDS[1], KINDS[3]])
def test_unknown_step_conditioning_is_refused(kind, other):
    with pytest.raises(pg.InputError, match=f"'input' or '{other}', got 'none'"):
        kind(S, A, H, step_conditioning="none")


@pytest.mark.parametrize("hidden_dim, num_heads", [(15, 4), (0, 4), (3, 1), (2, 1)])
def test_width_must_suit_heads_and_sinusoids(hidden_dim, num_heads):
    with pytest.raises(pg.InputError, match=f"hidden_dim .* {hidden_dim} and num_heads"):
        pg.TransformerDenoiser(S, A, H, hidden_dim=hidden_dim, num_heads=num_heads)
