import pytest
import torch

import polygrad_fast as pg
from cases import INDEX, part, recorded_arrays
from polygrad_fast.compat import official

MLP, TRANSFORMER = "denoiser_mlp_x0", "denoiser_transformer_x0"
KINDS = {MLP: pg.ResidualMLPDenoiser, TRANSFORMER: pg.TransformerDenoiser}


def released(name: str, prefix: str) -> dict[str, torch.Tensor]:
    """Weights of a recorded network, the prefix taken off."""
    return part(recorded_arrays(name), prefix)


def dims(name: str) -> dict[str, int]:
    return {key: INDEX[name][key] for key in ("observation_dim", "action_dim", "horizon")}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", KINDS)
def test_networks_are_told_apart_by_their_names(name):
    weights = released(name, "model.")
    assert weights
    denoiser = official.load_denoiser(weights, **dims(name))
    assert type(denoiser) is KINDS[name]
    assert denoiser.num_layers == INDEX[name]["layers"]
    assert denoiser.hidden_dim == INDEX[name]["hidden"]
    assert (denoiser.observation_dim, denoiser.horizon) == (5, INDEX[name]["horizon"])


@pytest.mark.parametrize("name", KINDS)
def test_the_prefix_model_is_stripped(name):
    plain = official.load_denoiser(released(name, "model."), **dims(name))
    weights = {f"model.{key}": value for key, value in released(name, "model.").items()}
    prefixed = official.load_denoiser(weights, **dims(name))
    assert same(plain.state_dict(), prefixed.state_dict())


@pytest.mark.parametrize("name", KINDS)
def test_export_undoes_load(name):
    weights = released(name, "model.")
    denoiser = official.load_denoiser(weights, **dims(name))
    assert same(official.export_denoiser(denoiser.state_dict(), denoiser), weights)


@pytest.mark.parametrize("num_layers", [1, 2, 12])
@pytest.mark.parametrize("kind", [pg.ResidualMLPDenoiser, pg.TransformerDenoiser])
def test_load_undoes_export(kind, num_layers):
    denoiser = kind(3, 2, 4, hidden_dim=8, num_layers=num_layers)
    weights = official.export_denoiser(denoiser.state_dict(), denoiser)
    assert len(weights) == len(denoiser.state_dict())
    loaded = official.load_denoiser(weights, 3, 2, 4)
    assert type(loaded) is kind and loaded.num_layers == num_layers
    assert same(loaded.state_dict(), denoiser.state_dict())


def test_loaded_weights_are_copies():
    weights = released(MLP, "model.")
    denoiser = official.load_denoiser(weights, **dims(MLP))
    with torch.no_grad():
        denoiser.output.weight.zero_()
    assert weights["residual_mlp.final_linear.weight"].abs().max() > 0


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("wrong", ["observation_dim", "action_dim", "horizon"])
def test_wrong_dimensions_are_named(name, wrong):
    asked = dims(name) | {wrong: dims(name)[wrong] + 1}
    with pytest.raises(pg.InputError, match=f"{wrong} {asked[wrong]}.*size mismatch"):
        official.load_denoiser(released(name, "model."), **asked)


@pytest.mark.parametrize(
    "weights",
    [
        {},
        {"weight": torch.zeros(2, 2)},
        {"model.0.weight": torch.zeros(2, 2)},
        {"final_linear.weight": torch.zeros(2, 2)},
    ],
)
def test_foreign_networks_are_refused(weights):
    with pytest.raises(pg.InputError, match="residual MLP.*transformer.*got names"):
        official.load_denoiser(weights, 5, 2, 4)


def test_our_own_state_dict_is_refused():
    denoiser = pg.ResidualMLPDenoiser(3, 2, 4, hidden_dim=8, num_layers=1)
    with pytest.raises(pg.InputError, match="got names"):
        official.load_denoiser(denoiser.state_dict(), 3, 2, 4)


@pytest.mark.parametrize("name", KINDS)
def test_missing_and_additional_weights_are_refused(name):
    weights = released(name, "model.")
    last = "residual_mlp.final_linear.bias" if name == MLP else "output_head.bias"
    with pytest.raises(pg.InputError, match="weights must be those of a released .*, got others: "):
        official.load_denoiser({k: v for k, v in weights.items() if k != last}, **dims(name))
    with pytest.raises(pg.InputError, match="weights must be those of a released .*, got others: "):
        official.load_denoiser(weights | {"surplus": torch.zeros(1)}, **dims(name))


ACTOR = "sample_mlp_x0_official"


def test_actors_keep_weights_and_deviation():
    actor, log_std = released(ACTOR, "actor."), released(ACTOR, "logstd")[""]
    policy = official.load_policy(actor, log_std, min_std=0.2)
    torch.testing.assert_close(policy.std, log_std.reshape(-1).exp() + 0.2)
    assert (policy.observation_dim, policy.action_dim) == (5, 2)
    loaded = {f"model.{k}": v for k, v in policy.network.state_dict().items()}
    assert same(loaded, actor)
    with_prefix = official.load_policy({f"actor.{k}": v for k, v in actor.items()}, log_std, 0.2)
    assert same(with_prefix.state_dict(), policy.state_dict())


def test_actors_of_another_kind_are_refused():
    log_std = torch.zeros(2)
    with pytest.raises(pg.InputError, match=r"actor or critic.*got names \['scale'\]"):
        official.load_policy({"scale": torch.zeros(3)}, log_std)
    with pytest.raises(pg.InputError, match="released actor"):
        official.load_policy(released(MLP, "model."), log_std)
    with pytest.raises(pg.InputError, match="log_std"):
        official.load_policy(released(ACTOR, "actor."), torch.zeros(3))


def test_actor_critic_starts_with_its_target_at_the_critic():
    name = "a2c_normed_inputs"
    actor, critic = released(name, "before.actor."), released(name, "before.critic.")
    log_std = released(name, "before.logstd")[""]
    observation_dim = next(v for v in actor.values() if v.ndim == 2).shape[1]
    normalizer = pg.Normalizer(observation_dim, log_std.numel())
    config = pg.A2CConfig(gamma=0.5)
    loaded = official.load_actor_critic(
        actor, critic, log_std, normalizer, config, normed_inputs=True
    )
    assert loaded.config is config and loaded.normalizer is normalizer
    assert loaded.policy.normed_inputs and loaded.policy.normalizer is normalizer
    value = {f"model.{k}": v for k, v in loaded.value_function.network.state_dict().items()}
    assert same(value, critic)
    assert same(loaded.target_value_function.state_dict(), loaded.value_function.state_dict())
