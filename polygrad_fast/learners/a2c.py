"""Advantage actor-critic on imagined trajectories (section 4.3, table 1)."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polygrad_fast.config import A2CConfig
from polygrad_fast.errors import InputError, NonFiniteError
from polygrad_fast.learners.advantages import (
    generalized_advantages,
    spread,
    standardized,
    step_weights,
)
from polygrad_fast.learners.checks import (
    check_learning_policy,
    check_trajectories,
    moments_and_outputs,
)
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.policy import ValueFunction, entropy, log_prob
from polygrad_fast.profiling import annotate
from polygrad_fast.protocols import (
    policy_moments,
    reads_normalized,
)


def _distinct(tensor: Tensor) -> Tensor:
    """Return each number of an expanded tensor once: PyTorch's mean over axes of stride 0 adds up
    rounding errors, 1e-4 in 50,000 equal float32 numbers."""
    return tensor[tuple(0 if stride == 0 else slice(None) for stride in tensor.stride())]


@dataclass(frozen=True)
class _Losses:
    """The losses of one batch, and what they were computed from; T = H - 1 steps."""

    actor_loss: Tensor
    critic_loss: Tensor
    target_weights: dict[str, Tensor]  # of the target critic, moved already
    policy_inputs: Tensor  # [B, T, S], in the space that the policy reads
    raw_actions: Tensor  # [B, T, A]
    mean: Tensor  # [B, T, A]
    std: Tensor  # [B, T, A]
    old_log_prob: Tensor  # [B, T]
    policy_entropy: Tensor  # [B, T]
    values: Tensor  # [B, T]
    rewards: Tensor  # [B, H], as the critic learns from them


class ActorCritic:
    """Policy, value function, its slow target, their optimizers, and one `update`.

    Weights change in place. Implements `polygrad_fast.learners.Learner`.

    Of the policy it uses what `polygrad_fast.Policy` says, and where it has them, as a
    `GaussianPolicy`: the parameter `log_std`, whose gradient is not clipped and is reported, and
    the module `network`, whose outputs `saturation_coef` penalizes.

    Args:
        policy: a module that is a `polygrad_fast.Policy`.
        value_function: maps observations [..., S] to values [...].
        normalizer: the moments of everything that `update` gets.
        config: default `A2CConfig()`, the released settings.
        normed_inputs: whether the value function reads normalized observations and learns from
            normalized rewards; None: where the policy reads normalized observations.

    Raises:
        InputError: a policy that is no module with weights to train, or, with `saturation_coef`,
            does not call its `network` once.
    """

    name = "a2c"

    def __init__(
        self,
        policy: nn.Module,
        value_function: ValueFunction,
        normalizer: Normalizer,
        config: A2CConfig | None = None,
        normed_inputs: bool | None = None,
    ):
        self.policy, self.value_function, self.normalizer = policy, value_function, normalizer
        self.config = config if config is not None else A2CConfig()
        self.normed_inputs = reads_normalized(policy) if normed_inputs is None else normed_inputs
        check_learning_policy(policy, normalizer, self.config)
        self.target_value_function = copy.deepcopy(value_function).requires_grad_(False)
        self.actor_optimizer = torch.optim.AdamW(
            policy.parameters(), lr=self.config.actor_learning_rate
        )
        self.critic_optimizer = torch.optim.AdamW(
            value_function.parameters(), lr=self.config.critic_learning_rate
        )
        self.log_actor_learning_rate = torch.tensor(
            math.log(self.config.actor_learning_rate), requires_grad=True
        )
        self.learning_rate_optimizer = torch.optim.AdamW(
            [self.log_actor_learning_rate], lr=self.config.actor_learning_rate_lr
        )

    def step(
        self,
        observations: Tensor,
        actions: Tensor,
        rewards: Tensor,
        terminals: Tensor,
        progress: float = 0.0,
    ) -> dict[str, Tensor]:
        """Take one actor and one critic step on imagined trajectories.

        Advantages come from GAE with the target critic; steps after the first terminal one carry
        weight 0, that one `terminal_step_weight`; the actor's step is scaled until mean
        |log pi_new - log pi_old| is within tolerance of `target_update` (appendix A). Unlike the
        released code, the Adam direction is computed once and only scaled, log-std included.

        Where an input, loss, gradient or update size is not finite, one of the metrics is not
        either, and nothing is changed.

        Args:
            observations, actions, rewards: normalized, [B, H, S], [B, H, A] and [B, H].
            terminals: 0/1 [B, H].
            progress: share of training done, for `final_target_update`.

        Returns:
            Metrics by name: detached scalars on the device.

        Raises:
            InputError: shapes differ or H < 2.
        """
        config = self.config
        check_trajectories(self.policy, self.normalizer, observations, actions, rewards, terminals)
        target_update = config.target_update
        if config.final_target_update is not None:
            target_update += progress * (config.final_target_update - target_update)
        losses = self._losses(observations, actions, rewards, terminals, config)
        mean, std, raw_actions = losses.mean, losses.std, losses.raw_actions

        self.actor_optimizer.zero_grad(set_to_none=True)
        self.critic_optimizer.zero_grad(set_to_none=True)
        (losses.actor_loss + losses.critic_loss).backward()
        max_norm = config.max_grad_norm if config.max_grad_norm is not None else math.inf
        # log-std is not clipped, as in the released code
        log_std = dict(self.policy.named_parameters()).get("log_std")
        clipped = [p for p in self.policy.parameters() if p is not log_std]
        actor_grad_norm = nn.utils.clip_grad_norm_(clipped, max_norm)
        critic_grad_norm = nn.utils.clip_grad_norm_(self.value_function.parameters(), max_norm)

        with torch.no_grad():
            z = (raw_actions - mean) / std
            log_std_metrics = {}
            if log_std is not None and log_std.grad is not None:
                log_std_metrics["log_std_grad_norm"] = log_std.grad.norm()
            metrics = {
                "actor_loss": losses.actor_loss.detach(),
                "critic_loss": losses.critic_loss.detach(),
                "actor_grad_norm": actor_grad_norm,
                "critic_grad_norm": critic_grad_norm,
                **log_std_metrics,
                "entropy": losses.policy_entropy.mean(),
                "policy_std": _distinct(std).mean(),
                "action_mean": z.mean(),
                "action_std": spread(z, "std"),
                "action_mean_abs": spread(z, "mean_abs"),
                "value": losses.values[:, 0].mean(),
                "reward": losses.rewards.mean(),
                "terminal_rate": terminals.mean(),
            }
            if torch.stack(list(metrics.values())).isfinite().all():
                with annotate("line_search"):
                    old_log_prob = losses.old_log_prob.detach()
                    measured = self._step_actor(
                        losses.policy_inputs, raw_actions, old_log_prob, target_update
                    )
                if math.isfinite(measured["update_size_initial"]):
                    for name, weight in self.target_value_function.named_parameters():
                        weight.copy_(losses.target_weights[name])
                    self.critic_optimizer.step()
                double = functools.partial(torch.tensor, dtype=torch.float64, device=rewards.device)
                metrics |= {name: double(value) for name, value in measured.items()}
        return metrics

    def update(
        self,
        observations: Tensor,
        actions: Tensor,
        rewards: Tensor,
        terminals: Tensor,
        progress: float = 0.0,
    ) -> dict[str, float]:
        """Take a `step` and read its metrics on the host.

        Args:
            observations, actions, rewards, terminals, progress: as `step` gets them.

        Returns:
            Metrics as floats.

        Raises:
            InputError: shapes differ or H < 2.
            NonFiniteError: an input, loss, gradient or update size is not finite; nothing was
                changed.
        """
        found = self.step(observations, actions, rewards, terminals, progress)
        # one synchronization; float64 keeps what a learning rate of a double was
        values = torch.stack([value.double() for value in found.values()]).tolist()
        metrics = dict(zip(found, values, strict=True))
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise NonFiniteError(f"{name} is {value}")
        return metrics

    def actor_gradient(
        self,
        observations: Tensor,
        actions: Tensor,
        rewards: Tensor,
        terminals: Tensor,
        config: A2CConfig | None = None,
    ) -> Tensor:
        """Return the gradient of the actor's loss that `update` would follow, before its clip, all
        of the policy's parameters in one vector [P]; nothing changes.

        Args:
            observations, actions, rewards, terminals: as `update` gets them.
            config: options of the loss other than this learner's, as another `gae_lambda`.

        Raises:
            InputError: shapes differ or H < 2.
            NonFiniteError: the gradient is not finite.
        """
        check_trajectories(self.policy, self.normalizer, observations, actions, rewards, terminals)
        config = self.config if config is None else config
        losses = self._losses(observations, actions, rewards, terminals, config)
        parameters = list(self.policy.parameters())
        gradients = torch.autograd.grad(
            losses.actor_loss, parameters, allow_unused=True, materialize_grads=True
        )
        gradient = torch.cat([part.flatten() for part in gradients])
        if not torch.isfinite(gradient).all():
            raise NonFiniteError("the gradient of the actor's loss is not finite")
        return gradient

    def _losses(
        self,
        observations: Tensor,
        actions: Tensor,
        rewards: Tensor,
        terminals: Tensor,
        config: A2CConfig,
    ) -> _Losses:
        """Return both losses on imagined trajectories, as `update` gets them; nothing changes."""
        raw_actions = self.normalizer.unnormalize(actions, "actions")[:, :-1]
        raw_observations = observations
        if not (self.normed_inputs and reads_normalized(self.policy)):
            raw_observations = self.normalizer.unnormalize(observations, "observations")
        policy_inputs = observations if reads_normalized(self.policy) else raw_observations
        policy_inputs = policy_inputs[:, :-1]
        observations = observations if self.normed_inputs else raw_observations
        if config.reward_rms is not None:
            moments = self.normalizer.rewards_mean.square() + self.normalizer.rewards_scale.square()
            rewards = self.normalizer.unnormalize(rewards, "rewards")
            rewards = rewards * (config.reward_rms / moments.sqrt())
        elif not self.normed_inputs:
            rewards = self.normalizer.unnormalize(rewards, "rewards")

        with torch.no_grad():
            # the target moves first, as released, but is stored only once all results are finite
            current = dict(self.value_function.named_parameters())
            target_weights = {
                name: weight.lerp(current[name], 1.0 - config.target_critic_decay)
                for name, weight in self.target_value_function.named_parameters()
            }
            target_values = torch.func.functional_call(
                self.target_value_function, target_weights, (observations,)
            )
            advantages = generalized_advantages(
                rewards, target_values, terminals, config.gamma, config.gae_lambda
            )
            value_targets = advantages + target_values[:, :-1]
            weights = step_weights(terminals[:, :-1], config.terminal_step_weight)
            if config.normalize_advantages:
                counted = weights if config.advantage_moments == "counted" else None
                advantages = standardized(advantages, counted)

        if config.saturation_coef > 0:
            mean, std, policy_outputs = moments_and_outputs(
                self.policy, self.normalizer, policy_inputs
            )
        else:
            mean, std = self._moments(policy_inputs)
        old_log_prob = log_prob(raw_actions, mean, std)
        policy_entropy = entropy(std)
        actor_loss = -old_log_prob * advantages - config.entropy_coef * policy_entropy
        actor_loss = (actor_loss * weights).mean()
        if config.saturation_coef > 0:
            actor_loss = actor_loss + config.saturation_coef * policy_outputs.square().mean()
        values = self.value_function(observations)[:, :-1]
        critic_loss = (0.5 * (value_targets - values).square() * weights).mean()
        return _Losses(
            actor_loss,
            critic_loss,
            target_weights,
            policy_inputs,
            raw_actions,
            mean,
            std,
            old_log_prob,
            policy_entropy,
            values,
            rewards,
        )

    @torch.no_grad()
    def keep_functions(self, mean: Tensor, scale: Tensor) -> None:
        """Keep policy and values the same functions of raw observations, after the normalizer's
        moments of observations have changed from `mean` and `scale` [S]."""
        ratio = self.normalizer.observations_scale / scale
        shift = (self.normalizer.observations_mean - mean) / scale
        for first in self.first_layers():
            first.bias += first.weight @ shift
            first.weight *= ratio

    def first_layers(self) -> list[nn.Linear]:
        """Return the first layers of the networks that read normalized observations.

        Raises:
            InputError: such a policy does not begin with a Linear, as `network[0]`.
        """
        networks = [self.policy] if reads_normalized(self.policy) else []
        if self.normed_inputs:
            networks += [self.value_function, self.target_value_function]
        firsts = []
        for owner in networks:
            network = getattr(owner, "network", None)
            first = network[0] if isinstance(network, nn.Sequential) and len(network) else None
            if not isinstance(first, nn.Linear) or first.bias is None:
                raise InputError(
                    f"normalizer.preserve_functions must be False for {type(owner).__name__}, "
                    f"whose network[0] is not a Linear with a bias, got True"
                )
            firsts.append(first)
        return firsts

    def _moments(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the policy's mean and std at inputs in the space it reads."""
        return policy_moments(
            self.policy, self.normalizer, inputs, normalized=reads_normalized(self.policy)
        )

    @torch.no_grad()
    def _step_actor(
        self, inputs: Tensor, raw_actions: Tensor, old_log_prob: Tensor, target_update: float
    ) -> dict[str, float]:
        """Step the actor; scale the step until the update size is within tolerance (appendix A).

        Where the size is not finite, nothing is changed.
        """
        config = self.config
        parameters = list(self.policy.parameters())
        before = [p.clone() for p in parameters]
        optimizer_before = copy.deepcopy(self.actor_optimizer.state_dict())
        self.actor_optimizer.step()
        direction = [p - b for p, b in zip(parameters, before, strict=True)]

        def update_size() -> float:
            with annotate("line_search_trial"):
                new_log_prob = log_prob(raw_actions, *self._moments(inputs))
                return (new_log_prob - old_log_prob).abs().mean().item()

        def move(scale: float) -> float:
            for p, b, d in zip(parameters, before, direction, strict=True):
                p.copy_(b + scale * d)
            return update_size()

        learning_rate = self.actor_optimizer.param_groups[0]["lr"]
        size = initial_size = update_size()
        if not math.isfinite(size):
            for p, b in zip(parameters, before, strict=True):
                p.copy_(b)
            self.actor_optimizer.load_state_dict(optimizer_before)
            return {"update_size_initial": initial_size}
        trials, scale = 1, 1.0
        low, high = (target_update * (1 + s * config.line_search_tolerance) for s in (-1, 1))
        shrinking = size > target_update
        ratio = config.line_search_ratio if shrinking else 1 / config.line_search_ratio
        while config.line_search and not low <= size <= high:
            passed = (size > target_update) != shrinking  # the target lies between two trials
            too_long = not shrinking and scale * ratio * learning_rate > config.actor_learning_rate
            if passed or too_long or trials > config.line_search_max_steps:
                break
            scale *= ratio
            size = move(scale)
            trials += 1
        if config.learn_actor_learning_rate:
            self._learn_learning_rate(initial_size, target_update)
        return {
            "update_size_initial": initial_size,
            "update_size": size,
            "linesearch_steps": trials,
            "actor_learning_rate": self.actor_optimizer.param_groups[0]["lr"],
        }

    def _learn_learning_rate(self, initial_size: float, target_update: float) -> None:
        """Move the log of the actor's learning rate against the sign of (update size - target);
        cap it."""
        gradient = torch.tensor(initial_size - target_update)
        self.log_actor_learning_rate.grad = gradient.to(self.log_actor_learning_rate)
        self.learning_rate_optimizer.step()
        with torch.no_grad():
            self.log_actor_learning_rate.clamp_(max=math.log(self.config.actor_learning_rate))
        learning_rate = self.log_actor_learning_rate.exp().item()  # float32 may round above the cap
        self.actor_optimizer.param_groups[0]["lr"] = min(
            learning_rate, self.config.actor_learning_rate
        )

    def modules(self) -> dict[str, nn.Module]:
        """Return the networks by name."""
        return {
            "policy": self.policy,
            "value_function": self.value_function,
            "target_value_function": self.target_value_function,
        }

    def state_dict(self) -> dict:
        """Return optimizer states and the learned learning rate; the weights are saved with the
        other weights."""
        return {
            "actor_optimizer": self.actor_optimizer.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
            "learning_rate_optimizer": self.learning_rate_optimizer.state_dict(),
            "log_actor_learning_rate": self.log_actor_learning_rate.detach().clone(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned."""
        self.actor_optimizer.load_state_dict(state["actor_optimizer"])
        self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        self.learning_rate_optimizer.load_state_dict(state["learning_rate_optimizer"])
        with torch.no_grad():
            self.log_actor_learning_rate.copy_(state["log_actor_learning_rate"])
