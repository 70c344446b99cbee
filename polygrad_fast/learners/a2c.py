"""Advantage actor-critic on imagined trajectories (section 4.3, table 1)."""

from __future__ import annotations

import copy
import math
from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from polygrad_fast.config import A2CConfig
from polygrad_fast.denoisers.dynamics import Dynamics
from polygrad_fast.errors import InputError, NonFiniteError
from polygrad_fast.learners.advantages import (
    generalized_advantages,
    spread,
    standardized,
    step_weights,
)
from polygrad_fast.learners.checks import check_learning_policy, check_trajectories
from polygrad_fast.learners.line_search import FoundStep, LineSearch
from polygrad_fast.learners.optimizers import FusedAdamW, clip_gradients
from polygrad_fast.learners.passes import (
    ActorPass,
    Batch,
    Pathwise,
    actor_passes,
    critic_passes,
    is_as_built,
)
from polygrad_fast.learners.pathwise import Steps, action_sensitivities
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.policy import ValueFunction
from polygrad_fast.profiling import annotate
from polygrad_fast.protocols import reads_normalized
from polygrad_fast.ranks import Ranks


@dataclass(frozen=True)
class _Targets:
    """What a batch's value targets were computed from."""

    target_weights: dict[str, Tensor]  # of the target critic, moved already
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
        dynamics: by which trajectories are imagined; for pathwise gradients only.

    Attributes:
        ranks: the processes that train on a part of every batch each: moments of advantages,
            gradients, metrics and the line search are those of the whole batch.

    Raises:
        InputError: a policy that is no module with weights to train, or, with `saturation_coef`,
            does not call its `network` once; pathwise gradients without dynamics.
    """

    name = "a2c"

    def __init__(
        self,
        policy: nn.Module,
        value_function: ValueFunction,
        normalizer: Normalizer,
        config: A2CConfig | None = None,
        normed_inputs: bool | None = None,
        dynamics: Dynamics | None = None,
    ):
        self.policy, self.value_function, self.normalizer = policy, value_function, normalizer
        self.config = config if config is not None else A2CConfig()
        self.normed_inputs = reads_normalized(policy) if normed_inputs is None else normed_inputs
        check_learning_policy(policy, normalizer, self.config)
        self.config = _with_estimator(self.config, dynamics)
        self._dynamics = dynamics
        self.target_value_function = copy.deepcopy(value_function).requires_grad_(False)
        weight = next(policy.parameters())

        def scalar(value: float) -> Tensor:
            return torch.tensor(value, dtype=torch.float32, device=weight.device)

        c = self.config
        self._max_log_rate = math.log(c.actor_learning_rate)
        self._max_rate = scalar(c.actor_learning_rate)
        if self._max_rate.item() > c.actor_learning_rate:  # as float32
            self._max_rate = torch.nextafter(self._max_rate, scalar(0.0))
        self.log_actor_learning_rate = scalar(self._max_log_rate).requires_grad_()
        self.actor_optimizer = FusedAdamW(policy.parameters(), self._max_rate.clone())
        self.critic_optimizer = FusedAdamW(
            value_function.parameters(), scalar(c.critic_learning_rate)
        )
        self.learning_rate_optimizer = FusedAdamW(
            [self.log_actor_learning_rate], scalar(c.actor_learning_rate_lr)
        )
        self.ranks = Ranks()
        self._line_search = LineSearch(c, weight.device, weight.dtype)
        self._actor = self._critic = None

    def step(
        self,
        observations: Tensor,
        actions: Tensor,
        rewards: Tensor,
        terminals: Tensor,
        progress: float | Tensor = 0.0,
    ) -> dict[str, Tensor]:
        """Take one actor and one critic step on imagined trajectories.

        Advantages come from GAE with the target critic, or the lesser of both critics; with
        pathwise gradients the actor learns from what actions change through the dynamics instead
        (`pathwise.action_sensitivities`).
        Steps after the first terminal one carry weight 0, that one `terminal_step_weight`; the
        actor's step is scaled until mean |log pi_new - log pi_old| is within tolerance of
        `target_update` (appendix A). Unlike the released code, the Adam direction is computed once
        and only scaled, log-std included.

        Where an input, loss, gradient or update size is not finite, one of the metrics is not
        either, and nothing is changed.

        Args:
            observations, actions, rewards: normalized, [B, H, S], [B, H, A] and [B, H].
            terminals: 0/1 [B, H].
            progress: share of training done, for `final_target_update`; a scalar on the device for
                a step that a graph holds.

        Returns:
            Metrics by name: detached scalars on the device, to which nothing on the host waits.

        Raises:
            InputError: shapes differ or H < 2.
        """
        config = self.config
        check_trajectories(self.policy, self.normalizer, observations, actions, rewards, terminals)
        target_update = config.target_update
        if config.final_target_update is not None:
            target_update += progress * (config.final_target_update - target_update)
        self._choose_passes()
        inputs = observations, actions, rewards, terminals
        batch, found = self._batch(*inputs, config, self._dynamics)
        actor, critic = self._actor.gradients(batch, config), self._critic.gradients(batch)
        gradients = [g for g in (*actor.gradients, *critic.gradients) if g is not None]
        self.ranks.average_(gradients)
        with torch.no_grad():
            metrics = {"actor_loss": actor.loss, "critic_loss": critic.loss}
            metrics |= self._clip(actor.gradients, critic.gradients)
            metrics |= {
                "entropy": actor.entropy.mean(),
                "policy_std": actor.std.mean(),
                "action_mean": actor.z.mean(),
                "action_std": spread(actor.z.movedim(0, -1), "std"),
                "action_mean_abs": spread(actor.z.movedim(0, -1), "mean_abs"),
                "value": critic.values[:, 0].mean(),
                "reward": found.rewards.mean(),
                "terminal_rate": terminals.mean(),
            }
            self.ranks.average_(list(metrics.values()))
            finite = torch.stack(list(metrics.values())).isfinite().all()
            with annotate("line_search"):
                step, finite = self._step_actor(batch, actor, target_update, finite)
            self.critic_optimizer.step((~finite).float())
            targets = list(self.target_value_function.parameters())
            _keep_where(finite, targets, list(found.target_weights.values()), targets)
        metrics |= {
            "update_size_initial": step.initial_size,
            "update_size": step.size,
            "linesearch_steps": step.num_trials.to(rewards.dtype),
            "actor_learning_rate": self.actor_optimizer.learning_rate.clone(),
        }
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
        values = torch.stack([value.double() for value in found.values()]).tolist()
        metrics = dict(zip(found, values, strict=True))
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise NonFiniteError(f"{name} is {value}")
        return metrics

    def capture_key(self) -> Hashable | None:
        """Return what a CUDA graph of a `step` depends on besides its arguments' shapes and the
        contents of tensors. None on a CPU, for networks that are not this library's or were
        changed, and where several processes train together: what these do may be nothing for a
        graph."""
        networks = self.policy, self.value_function, self.target_value_function
        if self._line_search.reads or self.ranks.number > 1:
            return None
        if not all(map(is_as_built, networks)):
            return None
        optimizers = self.actor_optimizer, self.critic_optimizer, self.learning_rate_optimizer
        moments = tuple(optimizer.moments.data_ptr() for optimizer in optimizers)
        weights = (p for network in networks for p in network.parameters())
        dynamics = self._dynamics and self._dynamics.capture_key()
        return moments, tuple((p.data_ptr(), p.requires_grad) for p in weights), dynamics

    def actor_gradient(
        self,
        observations: Tensor,
        actions: Tensor,
        rewards: Tensor,
        terminals: Tensor,
        config: A2CConfig | None = None,
        dynamics: Dynamics | None = None,
    ) -> Tensor:
        """Return the gradient of the actor's loss that `update` would follow, before its clip, all
        of the policy's parameters in one vector [P]; nothing changes.

        Args:
            observations, actions, rewards, terminals: as `update` gets them.
            config: options of the loss other than this learner's, as another `gae_lambda`.
            dynamics: by which the trajectories were imagined, where not by the learner's own.

        Raises:
            InputError: shapes differ or H < 2, or a pathwise gradient without dynamics.
            NonFiniteError: the gradient is not finite.
        """
        check_trajectories(self.policy, self.normalizer, observations, actions, rewards, terminals)
        dynamics = self._dynamics if dynamics is None else dynamics
        config = _with_estimator(self.config if config is None else config, dynamics)
        self._choose_passes()
        batch, _ = self._batch(observations, actions, rewards, terminals, config, dynamics)
        gradients = self._actor.gradients(batch, config).gradients
        pairs = zip(self.policy.parameters(), gradients, strict=True)
        gradient = torch.cat(
            [(p.new_zeros(p.numel()) if g is None else g).flatten() for p, g in pairs]
        )
        if not torch.isfinite(gradient).all():
            raise NonFiniteError("the gradient of the actor's loss is not finite")
        return gradient

    @torch.no_grad()
    def critic_rewards(self, rewards: Tensor, config: A2CConfig | None = None) -> Tensor:
        """Return normalized rewards, of any shape, in the unit that the critic learns them in, with
        these options or the learner's."""
        config = self.config if config is None else config
        if config.reward_rms is not None:
            rewards = self.normalizer.unnormalize(rewards, "rewards")
            return rewards * self._reward_factor(config.reward_rms)
        if self.normed_inputs:
            return rewards
        return self.normalizer.unnormalize(rewards, "rewards")

    @torch.no_grad()
    def target_values(self, observations: Tensor) -> Tensor:
        """Return the values [N] of normalized observations [N, S] by which learning bootstraps: the
        target critic's, or the lesser of its and the critic's (`A2CConfig.bootstrap`)."""
        if not self.normed_inputs:
            observations = self.normalizer.unnormalize(observations, "observations")
        values = self.target_value_function(observations)
        if self.config.bootstrap == "lesser":
            values = torch.minimum(values, self.value_function(observations))
        return values

    def _choose_passes(self) -> None:
        """Find how policy and value function, as they are now, are differentiated."""
        self._actor = actor_passes(self.policy, self.normalizer, self._actor)
        self._critic = critic_passes(self.value_function, self._critic)

    @torch.no_grad()
    def _batch(
        self,
        observations: Tensor,
        actions: Tensor,
        rewards: Tensor,
        terminals: Tensor,
        config: A2CConfig,
        dynamics: Dynamics | None,
    ) -> tuple[Batch, _Targets]:
        """Return what both losses are computed from, and what it was computed from."""
        normalizer, policy_normed = self.normalizer, reads_normalized(self.policy)
        raw_observations = observations
        if not (self.normed_inputs and policy_normed):
            raw_observations = normalizer.unnormalize(observations, "observations")
        predicted_rewards, rewards = rewards, self.critic_rewards(rewards, config)
        # the target moves first, as released, but is stored only once all results are finite
        current = dict(self.value_function.named_parameters())
        target_weights = {
            name: weight.lerp(current[name], 1.0 - config.target_critic_decay)
            for name, weight in self.target_value_function.named_parameters()
        }
        read = observations if self.normed_inputs else raw_observations
        is_pathwise = config.gradient_estimator == "pathwise" and dynamics is not None
        target_values, slopes = self._bootstrap_values(target_weights, read, config, is_pathwise)
        advantages = generalized_advantages(
            rewards, target_values, terminals, config.gamma, config.gae_lambda
        )
        value_targets = advantages + target_values[:, :-1]
        weights = step_weights(terminals[:, :-1], config.terminal_step_weight)
        if config.normalize_advantages:
            everyone = self.ranks.concatenate(advantages)
            counted = config.advantage_moments == "counted"
            counts = self.ranks.concatenate(weights) if counted else None
            advantages = self.ranks.own(standardized(everyone, counts))
        value_inputs = policy_inputs = read[:, :-1].contiguous()
        if policy_normed != self.normed_inputs:
            policy_inputs = (observations if policy_normed else raw_observations)[:, :-1]
        raw_actions = actions[:, :-1].movedim(-1, 0).contiguous()
        scale, mean = (
            m.view(-1, 1, 1) for m in (normalizer.actions_scale, normalizer.actions_mean)
        )
        raw_actions.mul_(scale).add_(mean)
        pathwise = None
        if slopes is not None:
            pathwise = self._pathwise(
                observations,
                policy_inputs,
                raw_actions,
                (rewards, predicted_rewards),
                terminals,
                (target_values, slopes),
                config,
                dynamics,
            )
        batch = Batch(
            policy_inputs, value_inputs, raw_actions, advantages, value_targets, weights, pathwise
        )
        return batch, _Targets(target_weights, rewards)

    def _bootstrap_values(
        self, target_weights: dict[str, Tensor], read: Tensor, config: A2CConfig, with_slopes: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the values [B, H] of `target_values` with these weights of the target critic and,
        if wanted, their gradients [B, H, S] in what the value function reads."""

        def find(weights: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
            if with_slopes:
                return self._critic.values_and_slopes(weights, read)
            return self._critic.values(weights, read), None

        values, slopes = find(target_weights)
        if config.bootstrap == "lesser":
            own, own_slopes = find(dict(self.value_function.named_parameters()))
            if with_slopes:
                slopes = torch.where((own < values).unsqueeze(-1), own_slopes, slopes)
            values = torch.minimum(values, own)
        return values, slopes

    def _pathwise(
        self,
        observations: Tensor,
        policy_inputs: Tensor,
        raw_actions: Tensor,
        rewards: tuple[Tensor, Tensor],
        terminals: Tensor,
        target: tuple[Tensor, Tensor],
        config: A2CConfig,
        dynamics: Dynamics,
    ) -> Pathwise:
        """Return what raw actions [A, B, T] change.

        Args:
            observations, terminals: as `step` gets them.
            policy_inputs: [B, T, S], in the space that the policy reads.
            rewards: as the critic learns from them, and normalized.
            target: the values [B, H] of `target_values`, and their gradients [B, H, S] in the
                observations as the value function reads them.
        """
        normalizer = self.normalizer
        target_values, slopes = target
        actions = raw_actions.permute(2, 1, 0).contiguous()
        reaction = self._actor.reaction(policy_inputs.movedim(1, 0).contiguous(), actions)
        # of what a network reads in normalized observations
        unit, scale = torch.ones_like(normalizer.observations_scale), normalizer.observations_scale
        policy_scale = unit if reads_normalized(self.policy) else scale
        slopes = slopes * (unit if self.normed_inputs else scale)
        steps = Steps(
            observations.movedim(1, 0).contiguous(),
            actions,
            *(part[:, :-1].t().contiguous() for part in rewards),
            terminals[:, :-1].t().contiguous(),
            target_values.t().contiguous(),
            slopes.movedim(1, 0).contiguous(),
        )
        reward_slope: Tensor | float = 1.0
        if config.reward_rms is not None:
            reward_slope = normalizer.rewards_scale * self._reward_factor(config.reward_rms)
        elif not self.normed_inputs:
            reward_slope = normalizer.rewards_scale
        returns, sensitivities = action_sensitivities(
            steps,
            dynamics,
            lambda t, gradient: reaction(t, gradient) * policy_scale,
            reward_slope,
            config.gamma,
            config.gae_lambda,
        )
        return Pathwise(returns.t(), sensitivities.permute(2, 1, 0).contiguous())

    def _reward_factor(self, reward_rms: float) -> Tensor:
        """Return the factor of raw rewards with which their root mean square is this."""
        normalizer = self.normalizer
        moments = normalizer.rewards_mean.square() + normalizer.rewards_scale.square()
        return reward_rms / moments.sqrt()

    def _clip(self, actor: list[Tensor | None], critic: list[Tensor | None]) -> dict[str, Tensor]:
        """Clip the gradients and hand them to the parameters; return their norms before."""
        max_norm = self.config.max_grad_norm
        max_norm = math.inf if max_norm is None else max_norm
        metrics = {}
        # log-std is not clipped, as in the released code
        names = [name for name, _ in self.policy.named_parameters()]
        log_std = dict(zip(names, actor, strict=True)).get("log_std")
        for name, module, gradients in (
            ("actor_grad_norm", self.policy, actor),
            ("critic_grad_norm", self.value_function, critic),
        ):
            clipped = [g for g in gradients if g is not None and g is not log_std]
            metrics[name] = clip_gradients(clipped, max_norm)
            for p, gradient in zip(module.parameters(), gradients, strict=True):
                if p.grad is not gradient:
                    p.grad = gradient
        if log_std is not None:
            metrics["log_std_grad_norm"] = log_std.norm()
        return metrics

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

    def _step_actor(
        self, batch: Batch, old: ActorPass, target_update: float | Tensor, finite: Tensor
    ) -> tuple[FoundStep, Tensor]:
        """Step the actor; scale the step until the update size is within tolerance (appendix A).

        Args:
            old: the pass before the step.
            finite: whether a step is to be taken, a bool scalar on the device.

        Returns:
            What the search found, and whether the step was taken.
        """
        optimizer = self.actor_optimizer
        weights = [p.detach() for p in self.policy.parameters() if p.grad is not None]
        before, moments = [w.clone() for w in weights], optimizer.moments.clone()
        optimizer.step((~finite).float())
        direction = torch._foreach_sub(weights, before)
        squares = old.z.square().sub_(1.0)

        def move(scale: Tensor) -> None:
            scaled = torch._foreach_mul(direction, scale)
            torch._foreach_copy_(weights, torch._foreach_add(before, scaled))

        def measure() -> tuple[Tensor, Tensor]:
            with annotate("line_search_trial"):
                mean, std = self._actor.moments(batch.policy_inputs)
                z, spread_out = (batch.raw_actions - mean) / std, (std / old.std).log()
                changes = -0.5 * torch.linalg.vecdot(z - old.z, z + old.z, dim=0)
                slopes = torch.linalg.vecdot(old.z, (mean - old.mean) / old.std, dim=0)
                changes = changes - spread_out.sum(0)
                slopes = slopes + (squares * spread_out).sum(0)
                concatenate = self.ranks.concatenate
                return concatenate(changes.flatten()), concatenate(slopes.flatten())

        step = self._line_search(move, measure, target_update, optimizer.learning_rate)
        finite = finite & step.initial_size.isfinite() & step.size.isfinite()
        _keep_where(finite, weights, weights, before)
        _keep_where(finite, [optimizer.moments], [optimizer.moments], [moments])
        if self.config.learn_actor_learning_rate:
            self._learn_learning_rate(step.initial_size - target_update, finite)
        return step, finite

    def _learn_learning_rate(self, gradient: Tensor, finite: Tensor) -> None:
        """Move the log of the actor's learning rate against the sign of (update size - target);
        cap it."""
        rate, log_rate = self.actor_optimizer.learning_rate, self.log_actor_learning_rate
        log_rate.grad = gradient.float()
        self.learning_rate_optimizer.step((~finite).float())
        log_rate.clamp_(max=self._max_log_rate)
        learned = torch.minimum(log_rate.exp(), self._max_rate)
        torch.where(finite, learned, rate, out=rate)

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


def _with_estimator(config: A2CConfig, dynamics: Dynamics | None) -> A2CConfig:
    """Return options with the estimator that these dynamics allow.

    Raises:
        InputError: a pathwise gradient without dynamics.
    """
    estimator = config.gradient_estimator
    if estimator == "auto":
        estimator = "score" if dynamics is None else "pathwise"
    if estimator == "pathwise" and dynamics is None:
        raise InputError(
            "a2c.gradient_estimator must be 'score' for a world model without one network for all "
            "steps, got 'pathwise': take world_model autoregressive, or trajectory diffusion with "
            "denoiser.kind rollout and sampler.action_update exact"
        )
    if estimator == config.gradient_estimator:
        return config
    return replace(config, gradient_estimator=estimator)


def _keep_where(
    condition: Tensor, tensors: list[Tensor], new: list[Tensor], old: list[Tensor]
) -> None:
    """Write `new` into tensors where a scalar on the device is true, else `old`."""
    for tensor, wanted, other in zip(tensors, new, old, strict=True):
        torch.where(condition, wanted, other, out=tensor)
