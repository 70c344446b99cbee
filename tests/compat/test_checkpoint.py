"""Checkpoints of the released agent: written by us, read by us, refused where they are broken."""

import dataclasses
import os
import pickle
from pathlib import Path

import pytest
import torch

import polygrad_fast as pg
from cases import INDEX, recorded_arrays
from polygrad_fast.compat import official

S, A, H, K = 5, 2, 4, 16
TABLES = {
    *(field.name for field in dataclasses.fields(pg.NoiseSchedule)),
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
}
NETWORKS = {
    f"{index}.{kind}" for index in (0, 1, 3, 4, 6) for kind in ("weight", "bias")
}  # two layers of Linear and LayerNorm, and the last Linear


def make_parts(kind=pg.ResidualMLPDenoiser, normed_inputs=False, step=7):
    normalizer = pg.Normalizer(S, A) if normed_inputs else None
    policy = pg.GaussianPolicy(
        S, A, 16, min_std=0.2, normed_inputs=normed_inputs, normalizer=normalizer
    )
    return official.ReleasedCheckpoint(
        step=step,
        denoiser=kind(S, A, H, hidden_dim=16, num_layers=2),
        schedule=pg.NoiseSchedule.cosine(K, 0.5),
        policy=policy,
        value_function=pg.ValueFunction(S, 16),
        target_value_function=pg.ValueFunction(S, 16),
    )


def modules(parts):
    names = ("denoiser", "policy", "value_function", "target_value_function")
    return [getattr(parts, name) for name in names]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def read(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("kind", [pg.ResidualMLPDenoiser, pg.TransformerDenoiser])
def test_what_is_exported_loads_again(kind, tmp_path):
    parts = make_parts(kind)
    paths = official.export_checkpoint(parts, tmp_path / "new")
    assert [path.name for path in paths] == ["step-7-ac.pt", "step-7-diffusion.pt"]
    loaded = official.load_checkpoint(tmp_path / "new", min_std=0.2)
    assert loaded.step == 7 and type(loaded.denoiser) is kind
    assert (loaded.denoiser.horizon, loaded.denoiser.num_layers) == (H, 2)
    for got, wanted in zip(modules(loaded), modules(parts), strict=True):
        assert same(got.state_dict(), wanted.state_dict())
    assert torch.equal(loaded.policy.std, parts.policy.std)
    assert same(vars(loaded.schedule), vars(parts.schedule))


def test_names_are_the_released_ones(tmp_path):
    paths = official.export_checkpoint(make_parts(), tmp_path)
    ac, diffusion = map(read, paths)
    wanted = {f"{n}.model.{k}" for n in ("actor", "critic", "critic_target") for k in NETWORKS}
    assert ac.keys() == wanted | {"logstd._bias"}
    assert ac["logstd._bias"].shape == (A,) and ac["critic.model.6.weight"].shape == (1, 16)
    recorded = [key for key in recorded_arrays("denoiser_mlp_x0") if key.startswith("model.")]
    two_layers = [key for key in recorded if "network.5." not in key]  # of three
    rename = {"model.residual_mlp.network.7": "model.residual_mlp.network.5"}
    names = {rename.get(key.rpartition(".")[0], key.rpartition(".")[0]) for key in two_layers}
    assert {key.rpartition(".")[0] for key in diffusion if key.startswith("model.")} == names
    assert {key for key in diffusion if not key.startswith("model.")} == TABLES
    assert all(table.shape == (K,) for name, table in diffusion.items() if name in TABLES)
    alphas = diffusion["alphas_cumprod"]
    torch.testing.assert_close(diffusion["sqrt_alphas_cumprod"].square(), alphas)
    torch.testing.assert_close(diffusion["sqrt_one_minus_alphas_cumprod"].square(), 1 - alphas)
    torch.testing.assert_close(diffusion["log_one_minus_alphas_cumprod"].exp(), 1 - alphas)


@pytest.mark.parametrize("name", ["denoiser_mlp_x0", "denoiser_transformer_x0"])
def test_recorded_networks_load_from_a_whole_diffusion_model(name, tmp_path):
    official.export_checkpoint(make_parts(), tmp_path)
    diffusion = read(tmp_path / "step-7-diffusion.pt")
    arrays = recorded_arrays(name)
    weights = {key: value for key, value in arrays.items() if key.startswith("model.")}
    tables = {key: value for key, value in diffusion.items() if key in TABLES}
    torch.save(tables | weights, tmp_path / "step-7-diffusion.pt")
    loaded = official.load_checkpoint(tmp_path)
    assert loaded.denoiser.horizon == INDEX[name]["horizon"]
    y = loaded.denoiser(arrays["x"], arrays["act"], arrays["t"])
    torch.testing.assert_close(y, arrays["y"], rtol=1e-4, atol=1e-5)


def test_the_latest_complete_step_is_loaded(tmp_path):
    for step in (9, 100, 20):
        official.export_checkpoint(make_parts(), tmp_path, step=step)
    (tmp_path / "step-900-ac.pt").write_bytes(b"")  # its other file was never written
    (tmp_path / "step-x-ac.pt").write_bytes(b"")
    assert official.load_checkpoint(tmp_path).step == 100
    assert official.load_checkpoint(tmp_path, 20).step == 20
    assert official.load_checkpoint(tmp_path, "20").step == 20
    for wrong in (True, 100.0, None):
        with pytest.raises(
            pg.InputError, match=f"step must be an integer or 'latest', got {wrong}"
        ):
            official.load_checkpoint(tmp_path, wrong)
    for missing in (900, 5, "last"):
        with pytest.raises(
            pg.CheckpointError, match=rf"N = {missing}, got those of \[9, 20, 100\]"
        ):
            official.load_checkpoint(tmp_path, missing)


def test_an_actor_critic_continues_with_the_stored_target(tmp_path):
    parts = make_parts(normed_inputs=True)
    official.export_checkpoint(parts, tmp_path)
    normalizer = pg.Normalizer(S, A)
    loaded = official.load_checkpoint(tmp_path, normed_inputs=True, normalizer=normalizer)
    assert loaded.policy.normed_inputs and loaded.policy.normalizer is normalizer
    actor_critic = loaded.actor_critic(normalizer)
    target = actor_critic.target_value_function
    assert same(target.state_dict(), parts.target_value_function.state_dict())
    shapes = (8, H, S), (8, H, A), (8, H), (8, H)
    metrics = actor_critic.update(*map(torch.randn, shapes[:3]), torch.zeros(shapes[3]))
    assert metrics["critic_loss"] > 0
    with pytest.raises(pg.InputError, match="normalizer must be for 5 observations, .*, got 4"):
        loaded.actor_critic(pg.Normalizer(4, A))
    with pytest.raises(
        pg.InputError, match="normalizer must be given with normed_inputs=True, got None"
    ):
        official.load_checkpoint(tmp_path, normed_inputs=True)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("payload_ran",)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def first_half(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def junk(path):
    path.write_bytes(b"junk")


def write_text(path):
    path.write_text("not a checkpoint")


def empty(path):
    path.write_bytes(b"")


def hide_code(path):
    torch.save({"logstd._bias": Payload()}, path)


def plain_pickle(path):
    path.write_bytes(pickle.dumps(Payload(), protocol=2))


def trainer_state(path):
    torch.save({"step": 3, "model": {}, "ema": {}}, path)


def save_list(path):
    torch.save([torch.zeros(2)], path)


def no_tables(path):
    torch.save({"model.weight": torch.zeros(2)}, path)


@pytest.mark.parametrize(
    "damage, message",
    [
        (cut, "cannot be read, it is damaged"),
        (write_text, "must hold nothing but tensors, got what could run code"),
        (empty, "cannot be read, it is damaged"),
        (junk, "cannot be read, it is damaged"),
        (first_half, "cannot be read, it is damaged"),
        (hide_code, "must hold nothing but tensors, got what could run code"),
        (plain_pickle, "nothing but tensors|cannot be read"),
        (trainer_state, "must be the state_dict.*got int under 'step'"),
        (save_list, "must be the state_dict.*got list"),
        (no_tables, "must be a checkpoint of the released agent, got one without '"),
    ],
)
@pytest.mark.parametrize("which", ["ac", "diffusion"])
def test_broken_files_are_refused_in_one_sentence(which, damage, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    official.export_checkpoint(make_parts(), tmp_path)
    damage(tmp_path / f"step-7-{which}.pt")
    with pytest.raises(pg.CheckpointError, match=message) as error:
        official.load_checkpoint(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert not (tmp_path / "payload_ran").exists()


def test_what_is_not_there_is_told(tmp_path):
    with pytest.raises(pg.CheckpointError, match="nothing must be a directory"):
        official.load_checkpoint(tmp_path / "nothing")
    with pytest.raises(pg.CheckpointError, match="must hold step-N-ac.pt.*latest, got those of"):
        official.load_checkpoint(tmp_path)


def test_foreign_networks_are_told(tmp_path):
    official.export_checkpoint(make_parts(), tmp_path)
    path = tmp_path / "step-7-diffusion.pt"
    tables = {key: value for key, value in read(path).items() if key in TABLES}
    torch.save(tables | {"model.0.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(pg.InputError, match="residual MLP.*transformer.*got names"):
        official.load_checkpoint(tmp_path)


def test_a_failed_export_leaves_the_older_file(tmp_path, monkeypatch):
    official.export_checkpoint(make_parts(), tmp_path)
    kept = (tmp_path / "step-7-ac.pt").read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        official.export_checkpoint(make_parts(), tmp_path)
    assert (tmp_path / "step-7-ac.pt").read_bytes() == kept
    assert sorted(os.listdir(tmp_path)) == ["step-7-ac.pt", "step-7-diffusion.pt"]


def make_agent(preset="default", **changes):
    config = pg.TrainConfig.from_preset(preset)
    denoiser = dataclasses.replace(config.denoiser, hidden_dim=16, num_layers=1)
    changes = {"denoiser": denoiser, "rescale_actions": False, **changes}
    return pg.PolyGRAD("Pendulum-v1", config=dataclasses.replace(config, **changes))


def test_an_agent_is_exported(tmp_path):
    agent = make_agent()
    ac_path, _ = official.export_checkpoint(agent, tmp_path)
    assert ac_path == tmp_path / "step-0-ac.pt"
    loaded = official.load_checkpoint(tmp_path)
    assert same(loaded.denoiser.state_dict(), agent.denoiser.state_dict())
    assert same(loaded.policy.state_dict(), agent.policy.state_dict())
    assert same(vars(loaded.schedule), vars(agent.sampler.components.schedule))


def test_the_schedule_exported_is_that_of_training(tmp_path):
    """Also of an agent that imagines in fewer steps, whose denoiser knows all of them."""
    agent = make_agent(sampler=pg.SamplerConfig.official(num_inference_steps=5))
    assert agent.sampler.components.schedule.num_train_timesteps == 5
    official.export_checkpoint(agent, tmp_path)
    wanted = pg.NoiseSchedule.cosine(128, 1.0)
    assert same(vars(official.load_checkpoint(tmp_path).schedule), vars(wanted))


@pytest.mark.parametrize(
    "preset, changes, message",
    [
        ("paper", {}, "scale_actions must be True .*, got False"),
        ("quick", {}, "scale_actions must be True .*, got False"),
        (
            "default",
            {"sampler": pg.SamplerConfig.official(denoiser_actions="clipped")},
            "denoiser_actions must be 'raw' .*, got 'clipped'",
        ),
        (
            "default",
            {"world_model": "autoregressive"},
            "config.world_model must be 'trajectory_diffusion' .* released code .* got 'autoreg",
        ),
        ("default", {"rescale_actions": True}, "rescale_actions must be False .*, got True"),
        (
            "paper",
            {"sampler": pg.SamplerConfig.official()},
            "step_conditioning must be 'input', .*, got 'layer'",
        ),
    ],
)
def test_agents_whose_weights_mean_something_else_are_not_exported(
    preset, changes, message, tmp_path
):
    with pytest.raises(pg.InputError, match=message):
        official.export_checkpoint(make_agent(preset, **changes), tmp_path)
    assert not any(tmp_path.iterdir())


def test_other_sources_are_told(tmp_path):
    with pytest.raises(pg.InputError, match="source must be a PolyGRAD agent.*got Linear"):
        official.export_checkpoint(torch.nn.Linear(2, 2), tmp_path)
    parts = dataclasses.replace(make_parts(), denoiser=torch.nn.Linear(2, 2))
    with pytest.raises(
        pg.InputError, match="the denoiser must be one of .*, got one that is a Linear"
    ):
        official.export_checkpoint(parts, tmp_path)


def double_output(module):
    module.register_forward_hook(lambda module, inputs, output: 2 * output)


def own_squash(policy):
    policy.squash = lambda outputs: (2 * outputs, policy.std.expand_as(outputs))


@pytest.mark.parametrize(
    "name, edit, message",
    [
        ("denoiser", lambda d: double_output(d.blocks[0]), "that has a forward hook in"),
        ("denoiser", lambda d: setattr(d.norm, "eps", 1.0), "that has another eps in"),
        ("policy", lambda p: double_output(p.network), "that has a forward hook in network"),
        ("policy", own_squash, "that has a squash of its own"),
        ("policy", lambda p: p.network.__setitem__(2, torch.nn.Tanh()), "has a Tanh in network.2"),
    ],
)
def test_changed_networks_are_not_exported(name, edit, message, tmp_path):
    """Their weights alone would be another network."""
    parts = make_parts()
    edit(getattr(parts, name))
    with pytest.raises(pg.InputError, match=f"the {name} must be one of .*, got one .*{message}"):
        official.export_checkpoint(parts, tmp_path)
    assert not any(tmp_path.iterdir())


def change(path, name, edit):
    state_dict = read(path)
    torch.save(state_dict | {name: edit(state_dict[name])}, path)


@pytest.mark.parametrize(
    "which, name, edit, message",
    [
        (
            "diffusion",
            "betas",
            lambda x: x[:5],
            "'alphas_cumprod' must hold one .* 5 .*, got the shape .16,.",
        ),
        (
            "diffusion",
            "posterior_variance",
            lambda x: x[:5],
            "must hold one .* 16 .*, got the shape .5,.",
        ),
        ("diffusion", "betas", lambda x: x[None], "must hold one .*, got the shape .1, 16."),
        ("diffusion", "betas", lambda x: x.long(), "must hold floating .*, got torch.int64"),
        ("diffusion", "betas", lambda x: x * torch.nan, "must hold finite .*, got NaN or infinity"),
        (
            "diffusion",
            "model.proj.weight",
            lambda x: x / 0,
            "must hold finite .*, got NaN or infinity",
        ),
        (
            "ac",
            "actor.model.0.weight",
            lambda x: x * torch.nan,
            "must hold finite .*, got NaN or infinity",
        ),
        ("ac", "logstd._bias", lambda x: x.int(), "must hold floating .*, got torch.int32"),
    ],
)
def test_broken_entries_are_told_with_file_and_name(which, name, edit, message, tmp_path):
    paths = official.export_checkpoint(make_parts(), tmp_path)
    path = paths[("ac", "diffusion").index(which)]
    change(path, name, edit)
    with pytest.raises(pg.CheckpointError, match=message) as error:
        official.load_checkpoint(tmp_path)
    assert str(error.value).startswith(f"{path}: {'' if 'alphas' in message else repr(name)}")


def test_half_precision_is_read_as_float32(tmp_path):
    for path in official.export_checkpoint(make_parts(), tmp_path):
        torch.save({name: value.half() for name, value in read(path).items()}, path)
    loaded = official.load_checkpoint(tmp_path)
    assert loaded.schedule.betas.dtype == loaded.denoiser.proj.weight.dtype == torch.float32


def test_an_unreadable_file_is_not_called_damaged(tmp_path):
    official.export_checkpoint(make_parts(), tmp_path)
    path = tmp_path / "step-7-ac.pt"
    path.unlink()
    path.mkdir()
    with pytest.raises(pg.CheckpointError, match="cannot be read: Is a directory"):
        official.load_checkpoint(tmp_path)


class DatasetNormalizer:
    observation_dim, action_dim = S, A


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(min_std="a"), "min_std must be a number of at least 0, got 'a'"),
        (dict(min_std=None), "min_std must be a number of at least 0, got None"),
        (dict(num_heads="a"), "num_heads must be an integer of at least 1, got 'a'"),
        (dict(num_heads=True), "num_heads must be an integer of at least 1, got True"),
        (
            dict(normalizer=DatasetNormalizer(), normed_inputs=True),
            "normalizer must be a polygrad_fast.Normalizer .*got DatasetNormalizer",
        ),
    ],
)
def test_wrong_arguments_are_told(options, message, tmp_path):
    official.export_checkpoint(make_parts(), tmp_path)
    with pytest.raises(pg.InputError, match=message):
        official.load_checkpoint(tmp_path, **options)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((None,), "normalizer must be a polygrad_fast.Normalizer .*got NoneType"),
        ((DatasetNormalizer(),), "normalizer must be .*got DatasetNormalizer"),
        ((pg.Normalizer(S, A), {}), "config must be an A2CConfig or None, got {}"),
    ],
)
def test_actor_critics_need_our_normalizer_and_configuration(arguments, message):
    parts = make_parts()
    with pytest.raises(pg.InputError, match=message):
        parts.actor_critic(*arguments)
    actor, critic = (x.network.state_dict() for x in (parts.policy, parts.value_function))
    with pytest.raises(pg.InputError, match=message):
        official.load_actor_critic(actor, critic, parts.policy.log_std.detach(), *arguments)


@pytest.mark.parametrize("log_std", [None, "x", {}])
def test_log_std_must_be_numbers(log_std):
    actor = make_parts().policy.network.state_dict()
    with pytest.raises(pg.InputError, match=r"log_std must be a tensor of shape \(2,\), got"):
        official.load_policy(actor, log_std)


def test_an_actor_critic_trains_the_checkpoints_networks():
    parts = make_parts()
    actor_critic = parts.actor_critic(pg.Normalizer(S, A))
    assert actor_critic.policy is parts.policy
    assert actor_critic.value_function is parts.value_function


@pytest.mark.parametrize("directory", [3, None, b"here"])
def test_folders_are_paths(directory):
    message = r"directory must be a path \(str or pathlib.Path\), got"
    with pytest.raises(pg.InputError, match=message):
        official.load_checkpoint(directory)
    with pytest.raises(pg.InputError, match=message):
        official.export_checkpoint(make_parts(), directory)


@pytest.mark.parametrize("step", [-1, 1.5, "a", True])
def test_steps_exported_are_numbers(step, tmp_path):
    with pytest.raises(pg.InputError, match=f"step must be an integer of at least 0, got {step!r}"):
        official.export_checkpoint(make_parts(), tmp_path, step)
    assert not any(tmp_path.iterdir())
