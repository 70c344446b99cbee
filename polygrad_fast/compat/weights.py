"""The released code's weights: their names and shapes, to this library's modules and back."""

from __future__ import annotations

import numbers
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from polygrad_fast.config import A2CConfig
from polygrad_fast.denoisers import ResidualMLPDenoiser, TransformerDenoiser
from polygrad_fast.errors import InputError
from polygrad_fast.learners.a2c import ActorCritic
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.policy import GaussianPolicy, ValueFunction
from polygrad_fast.protocols import check_normalizer

_LINEAR = re.compile(r"(\d+)\.weight$")
_TRANSFORMER_NAMES = {
    "transformer.wte": "input",
    "transformer.wpe": "position_embedding",
    "output_head": "output",
    "ln_1": "norm_1",
    "ln_2": "norm_2",
    "attn.c_attn": "qkv",
    "attn.c_proj": "attention_output",
    "mlp.c_fc": "mlp_input",
    "mlp.c_proj": "mlp_output",
    "transformer.h": "blocks",
    "time_mlp": "step_mlp",
}


def _residual_mlp_name(name: str, num_layers: int) -> str:
    """Return our name for a released one.

    network.0 is the input; then come pairs of a block and an Identity, then the final LayerNorm.
    """
    match = re.fullmatch(r"residual_mlp\.network\.(\d+)\.(.+)", name)
    if match:
        index, rest = int(match[1]), match[2]
        if index == 0:
            return f"input.{rest}"
        if index == 2 * num_layers + 1:
            return f"norm.{rest}"
        return f"blocks.{(index - 1) // 2}.{rest.replace('ln.', 'norm.')}"
    return name.replace("residual_mlp.final_linear", "output").replace("time_mlp", "step_mlp")


def _transformer_name(name: str) -> str:
    for old, new in _TRANSFORMER_NAMES.items():
        name = name.replace(old, new)
    return name


def part(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the entries whose names start with `prefix`, without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in state_dict.items()
        if name.startswith(prefix)
    }


def _strip(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    if all(name.startswith(prefix) for name in state_dict):
        return {name.removeprefix(prefix): value for name, value in state_dict.items()}
    return dict(state_dict)


def _load(module, weights: dict[str, Tensor], what: str):
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1:2] or [str(error)]
        raise InputError(
            f"weights must be those of {what}, got others: {first[0].strip()}"
        ) from None
    return module


def check_state_dict(state_dict: Mapping[str, Tensor], what: str) -> None:
    """Raise InputError unless this is a dictionary of named tensors."""
    if not isinstance(state_dict, Mapping):
        raise InputError(
            f"weights must be the state_dict of {what}, got {type(state_dict).__name__}"
        )
    for name, value in state_dict.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InputError(
                f"weights must be the state_dict of {what}, got {type(value).__name__} under "
                f"{name!r}"
            )


def denoiser_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the denoiser's part of a diffusion model's `state_dict`; a denoiser's own as it is."""
    check_state_dict(state_dict, "a released denoiser")
    if "betas" in state_dict:
        return part(state_dict, "model.")
    return _strip(state_dict, "model.")


def load_denoiser(
    state_dict: Mapping[str, Tensor],
    observation_dim: int,
    action_dim: int,
    horizon: int,
    num_heads: int = 4,
):
    """Build a denoiser from the released network's `state_dict`; residual MLP and transformer are
    told apart by names.

    Args:
        state_dict: parameters under the released names, or the whole diffusion model's (prefix
            "model.", beside its tables).
        observation_dim, action_dim, horizon: S, A and H.
        num_heads: attention heads, which the transformer's weights do not tell (released: 4).

    Raises:
        InputError: the names or shapes are those of neither network.
    """
    weights = denoiser_weights(state_dict)
    if isinstance(num_heads, bool) or not isinstance(num_heads, numbers.Integral):
        raise InputError(f"num_heads must be an integer of at least 1, got {num_heads!r}")
    if "residual_mlp.final_linear.weight" in weights:
        what = "a released residual MLP"
        num_layers = sum(bool(re.search(r"\.linear\.weight$", name)) for name in weights)
        if num_layers < 1 or "proj.weight" not in weights:
            raise InputError(
                f"weights must be those of {what}, with 'proj.weight' and blocks, got names "
                f"{sorted(weights)[:4]}"
            )
        embed_dim = weights["proj.weight"].shape[0]
        denoiser = ResidualMLPDenoiser(
            observation_dim,
            action_dim,
            horizon,
            hidden_dim=weights["residual_mlp.final_linear.weight"].shape[1],
            num_layers=num_layers,
            embed_dim=embed_dim,
        )
        renamed = {_residual_mlp_name(n, num_layers): v for n, v in weights.items()}
    elif "transformer.wte.weight" in weights:
        denoiser = TransformerDenoiser(
            observation_dim,
            action_dim,
            horizon,
            hidden_dim=weights["transformer.wte.weight"].shape[0],
            num_layers=sum(name.endswith("attn.c_attn.weight") for name in weights),
            num_heads=num_heads,
        )
        renamed = {_transformer_name(n): v for n, v in weights.items()}
        what = "a released transformer"
    else:
        raise InputError(
            f"weights must be the state_dict of a released residual MLP, with "
            f"'residual_mlp.final_linear.weight', or transformer, with 'transformer.wte.weight', "
            f"got names {sorted(weights)[:4]}"
        )
    what += f" of observation_dim {observation_dim}, action_dim {action_dim}, horizon {horizon}"
    return _load(denoiser, renamed, what)


def export_denoiser(weights: Mapping[str, Tensor], denoiser) -> dict[str, Tensor]:
    """Rename weights (or gradients) of one of our denoisers to the released names."""
    if type(denoiser) not in (ResidualMLPDenoiser, TransformerDenoiser):
        raise InputError(
            f"denoiser must be a ResidualMLPDenoiser or TransformerDenoiser, got "
            f"{type(denoiser).__name__}"
        )
    if denoiser.step_conditioning != "input":
        raise InputError(
            f"denoiser.step_conditioning must be 'input', as the released networks read the "
            f"diffusion step, got {denoiser.step_conditioning!r}"
        )
    if isinstance(denoiser, ResidualMLPDenoiser):
        last = 2 * denoiser.num_layers + 1

        def rename(name: str) -> str:
            name = name.replace("step_mlp", "time_mlp")
            name = re.sub(
                r"^blocks\.(\d+)\.",
                lambda match: f"residual_mlp.network.{2 * int(match[1]) + 1}.",
                name,
            ).replace(".norm.", ".ln.")
            name = re.sub(r"^norm\.", f"residual_mlp.network.{last}.", name)
            name = re.sub(r"^input\.", "residual_mlp.network.0.", name)
            return re.sub(r"^output\.", "residual_mlp.final_linear.", name)

    else:

        def rename(name: str) -> str:
            for old, new in _TRANSFORMER_NAMES.items():
                name = re.sub(rf"(^|\.){new}\.", rf"\g<1>{old}.", name)
            return name

    return {rename(name): value for name, value in weights.items()}


def export_actor_critic(
    policy: GaussianPolicy, value_function: ValueFunction, target_value_function: ValueFunction
) -> dict[str, Tensor]:
    """Return the `state_dict` of the released actor-critic with these weights."""
    networks = {
        "actor": policy.network,
        "critic": value_function.network,
        "critic_target": target_value_function.network,
    }
    weights = {
        f"{name}.model.{key}": value
        for name, network in networks.items()
        for key, value in network.state_dict().items()
    }
    return {**weights, "logstd._bias": policy.log_std.detach()}


def _trunk(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int, int, int, int]:
    """Return renamed weights, input, hidden and output width, and depth of a released MLP trunk."""
    check_state_dict(state_dict, "a released actor or critic")
    weights = state_dict
    for prefix in ("actor.", "critic.", "model."):
        weights = _strip(weights, prefix)
    layers = {int(match[1]): v for n, v in weights.items() if (match := _LINEAR.match(n))}
    matrices = [layers[i] for i in sorted(layers) if layers[i].ndim == 2]
    if len(matrices) < 2:
        raise InputError(
            f"weights must be the state_dict of a released actor or critic ('model.0.weight', ..), "
            f"got names {sorted(state_dict)[:4]}"
        )
    renamed = {f"network.{n}": v for n, v in weights.items()}
    in_dim, hidden_dim, out_dim = (
        matrices[0].shape[1],
        matrices[0].shape[0],
        matrices[-1].shape[0],
    )
    return renamed, in_dim, hidden_dim, out_dim, len(matrices) - 1


def load_policy(
    actor_state_dict: Mapping[str, Tensor],
    log_std: Tensor,
    min_std: float = 0.1,
    normalizer: Normalizer | None = None,
    normed_inputs: bool = False,
) -> GaussianPolicy:
    """Build a policy from the released actor's `state_dict` and its log-std [A].

    The standard deviation is exp(log_std) + min_std.
    """
    weights, in_dim, hidden_dim, out_dim, num_layers = _trunk(actor_state_dict)
    if isinstance(min_std, bool) or not isinstance(min_std, numbers.Real):
        raise InputError(f"min_std must be a number of at least 0, got {min_std!r}")
    if normalizer is not None:
        _check_normalizer(normalizer, in_dim)
    try:
        log_std = torch.as_tensor(log_std, dtype=torch.float32).reshape(-1)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"log_std must be a tensor of shape ({out_dim},), got {log_std!r}"
        ) from None
    policy = GaussianPolicy(
        in_dim,
        out_dim,
        hidden_dim,
        num_layers,
        init_std=min_std + 1.0,
        min_std=min_std,
        normed_inputs=normed_inputs,
        normalizer=normalizer,
    )
    return _load(policy, {**weights, "log_std": log_std}, "a released actor with its log_std")


def load_value_function(critic_state_dict: Mapping[str, Tensor]) -> ValueFunction:
    """Build a value function from the released critic's `state_dict`, or its target's."""
    weights, in_dim, hidden_dim, _, num_layers = _trunk(critic_state_dict)
    return _load(ValueFunction(in_dim, hidden_dim, num_layers), weights, "a released critic")


def load_actor_critic(
    actor_state_dict: Mapping[str, Tensor],
    critic_state_dict: Mapping[str, Tensor],
    log_std: Tensor,
    normalizer: Normalizer,
    config: A2CConfig | None = None,
    min_std: float = 0.1,
    normed_inputs: bool = False,
) -> ActorCritic:
    """Build an actor-critic from released weights; the target critic starts as a copy of the
    critic."""
    policy = load_policy(actor_state_dict, log_std, min_std, normalizer, normed_inputs)
    return build_actor_critic(policy, load_value_function(critic_state_dict), normalizer, config)


def build_actor_critic(
    policy: GaussianPolicy,
    value_function: ValueFunction,
    normalizer: Normalizer,
    config: A2CConfig | None,
) -> ActorCritic:
    """Return an actor-critic of networks for the same observations, which it trains in place."""
    _check_normalizer(normalizer, policy.observation_dim)
    in_dim = value_function.network[0].in_features
    if in_dim != policy.observation_dim:
        raise InputError(
            f"the critic must be for {policy.observation_dim} observations, as the actor, got "
            f"{in_dim}"
        )
    if not (config is None or isinstance(config, A2CConfig)):
        raise InputError(f"config must be an A2CConfig or None, got {config!r}")
    return ActorCritic(policy, value_function, normalizer, config)


def _check_normalizer(normalizer: Normalizer, observation_dim: int) -> None:
    """Raise InputError unless this is our normalizer of as many observations as the actor's."""
    check_normalizer(normalizer)
    if normalizer.observation_dim != observation_dim:
        raise InputError(
            f"the normalizer must be for {observation_dim} observations, as the actor, got "
            f"{normalizer.observation_dim}"
        )
