"""Losses of actor and critic, and their gradients: by autograd, or by passes written out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polygrad_fast.config import A2CConfig
from polygrad_fast.learners.checks import moments_and_outputs
from polygrad_fast.learners.explicit_mlp import ExplicitMLP, LinearizedMLP
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.policy import LOG_SQRT_2PI, GaussianPolicy, ValueFunction, entropy
from polygrad_fast.protocols import policy_moments, reads_normalized
from polygrad_fast.structure import change, parts


@dataclass(frozen=True)
class Pathwise:
    """What actions change; see `pathwise.action_sensitivities`."""

    returns: Tensor  # [B, T]
    sensitivities: Tensor  # [A, B, T], of these in the raw actions


@dataclass(frozen=True)
class Batch:
    """What both losses are computed from; T = H - 1 steps."""

    policy_inputs: Tensor  # [B, T, S], in the space that the policy reads
    value_inputs: Tensor  # [B, T, S], in the space that the value function reads
    raw_actions: (
        Tensor  # [A, B, T]: there are few, and PyTorch is slow where the last axis is short
    )
    advantages: Tensor  # [B, T]
    value_targets: Tensor  # [B, T]
    weights: Tensor  # [B, T], of the steps
    pathwise: Pathwise | None = None  # in place of the advantages


@dataclass(frozen=True)
class ActorPass:
    """The actor's loss, and what it was computed from; all detached."""

    loss: Tensor
    mean: Tensor  # [A, B, T]
    std: Tensor  # [A, B, T], [A, 1, 1] where it is the same everywhere
    z: Tensor  # [A, B, T], the actions, standardized
    log_prob: Tensor  # [B, T]
    entropy: Tensor  # as std without A
    gradients: list[Tensor | None]  # of the policy's parameters, None where they have no part


@dataclass(frozen=True)
class CriticPass:
    """The critic's loss, and what it was computed from; all detached."""

    loss: Tensor
    values: Tensor  # [B, T]
    gradients: list[Tensor | None]  # of the value function's parameters


def actor_loss(
    batch: Batch, steps: Tensor, entropies: Tensor, outputs: Tensor | None, config: A2CConfig
) -> Tensor:
    """Return the actor's loss.

    Args:
        steps: its parts without entropy, [B, T]: log pi times the advantages, with pathwise
            gradients the returns.
        entropies: of its steps, [B, T] or what is broadcast to it.
        outputs: of its network before the tanh, with `saturation_coef`.
    """
    loss = -((steps + config.entropy_coef * entropies) * batch.weights).mean()
    if outputs is not None:
        loss = loss + config.saturation_coef * outputs.square().mean()
    return loss


def critic_loss(batch: Batch, values: Tensor) -> Tensor:
    """Return the critic's loss at its values [B, T]."""
    return (0.5 * (batch.value_targets - values).square() * batch.weights).mean()


class AutogradActor:
    """Any policy.

    Args:
        policy: a `polygrad_fast.Policy`.
        normalizer: of its observations.
    """

    def __init__(self, policy: nn.Module, normalizer: Normalizer):
        self.policy, self.normalizer = policy, normalizer

    @torch.no_grad()
    def moments(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and std as in `ActorPass`, at inputs [B, T, S] in the space that the policy
        reads."""
        return self._actions_first(*self._call(inputs))

    def reaction(self, inputs: Tensor, raw_actions: Tensor) -> Callable[[int, Tensor], Tensor]:
        """Return what turns gradients in the raw actions of a step, [B, A], into gradients in its
        inputs, [B, S].

        Args:
            inputs: [T, B, S], in the space that the policy reads; of each step.
            raw_actions: [T, B, A], of which (a - mu) / sigma is what chance has drawn.
        """

        def pull_back(t: int, gradient: Tensor) -> Tensor:
            with torch.enable_grad():
                leaves = inputs[t].detach().requires_grad_()
                mean, std = self._call(leaves)
                z = ((raw_actions[t] - mean) / std).detach()
                (found,) = torch.autograd.grad(
                    mean + std * z, leaves, gradient, allow_unused=True, materialize_grads=True
                )
            return found

        return pull_back

    def gradients(self, batch: Batch, config: A2CConfig) -> ActorPass:
        """Return the actor's loss on a batch, and its gradients."""
        inputs, outputs = batch.policy_inputs, None
        with torch.enable_grad():
            if config.saturation_coef > 0:
                *moments, outputs = moments_and_outputs(self.policy, self.normalizer, inputs)
            else:
                moments = self._call(inputs)
            mean, std = self._actions_first(*moments)
            z = (batch.raw_actions - mean) / std
            log_probs = log_prob(z, std)
            entropies = entropy(std.movedim(0, -1))
            if batch.pathwise is None:
                steps = log_probs * batch.advantages
            else:
                changes = mean + std * z.detach() - batch.raw_actions  # 0, but for its gradient
                sensitivities = batch.pathwise.sensitivities
                steps = batch.pathwise.returns + torch.linalg.vecdot(sensitivities, changes, dim=0)
            loss = actor_loss(batch, steps, entropies, outputs, config)
            gradients = _gradients(loss, self.policy)
        results = (tensor.detach() for tensor in (loss, mean, std, z, log_probs, entropies))
        return ActorPass(*results, gradients)

    def _call(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        normalized = reads_normalized(self.policy)
        return policy_moments(self.policy, self.normalizer, inputs, normalized)

    def _actions_first(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Return [B, T, A] as [A, B, T], and what is expanded once: PyTorch's mean over axes of
        stride 0 adds up rounding errors, 1e-4 in 50,000 equal float32 numbers."""
        same = all(std.shape[i] == 1 or std.stride(i) == 0 for i in (0, 1))
        return mean.movedim(-1, 0), (std[:1, :1] if same else std).movedim(-1, 0)


def log_prob(z: Tensor, std: Tensor) -> Tensor:
    """Return log N(a; mean, std), summed over actions, of z = (a - mean) / std; [A, B, T] ->
    [B, T]."""
    return -0.5 * torch.linalg.vecdot(z, z, dim=0) - (std.log() + LOG_SQRT_2PI).sum(0)


class AutogradCritic:
    """Any value function: [..., S] -> [...]."""

    def __init__(self, value_function: nn.Module):
        self.value_function = value_function

    @torch.no_grad()
    def values(self, weights: dict[str, Tensor], observations: Tensor) -> Tensor:
        """Return values [B, H] at observations [B, H, S] with other weights, by name."""
        return torch.func.functional_call(self.value_function, weights, (observations,))

    def values_and_slopes(
        self, weights: dict[str, Tensor], observations: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return `values`, and their gradients in the observations, [B, H, S]."""
        with torch.enable_grad():
            leaves = observations.detach().requires_grad_()
            values = torch.func.functional_call(self.value_function, weights, (leaves,))
            if not values.requires_grad:  # the same at all observations
                return values, torch.zeros_like(observations)
            (slopes,) = torch.autograd.grad(
                values.sum(), leaves, allow_unused=True, materialize_grads=True
            )
        return values.detach(), slopes

    def gradients(self, batch: Batch) -> CriticPass:
        """Return the critic's loss on a batch, and its gradients."""
        with torch.enable_grad():
            values = self.value_function(batch.value_inputs)
            loss = critic_loss(batch, values)
            gradients = _gradients(loss, self.value_function)
        return CriticPass(loss.detach(), values.detach(), gradients)


def _gradients(loss: Tensor, module: nn.Module) -> list[Tensor | None]:
    parameters = list(module.parameters())
    trained = [p for p in parameters if p.requires_grad]
    found = dict(zip(trained, torch.autograd.grad(loss, trained, allow_unused=True), strict=True))
    return [found.get(p) for p in parameters]


class ExplicitActor:
    """A `GaussianPolicy` as its constructor makes it, on a CPU."""

    def __init__(self, policy: GaussianPolicy):
        self.policy, self.passes = policy, ExplicitMLP(policy.network)

    @torch.no_grad()
    def moments(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and std as in `ActorPass`, at inputs [B, T, S] in the space that the policy
        reads."""
        self.passes.read(list(self.policy.network.parameters()))
        mean = self.passes.outputs(inputs.flatten(0, 1)).tanh_()
        return mean.unflatten(1, inputs.shape[:2]), self.policy.std.view(-1, 1, 1)

    @torch.no_grad()
    def reaction(self, inputs: Tensor, raw_actions: Tensor) -> Callable[[int, Tensor], Tensor]:
        """Return the same as `AutogradActor.reaction`."""
        batch, network = inputs.shape[1], self.policy.network
        linearized = LinearizedMLP(network, list(network.parameters()), inputs.flatten(0, 1))
        means = linearized.outputs.tanh()

        def pull_back(t: int, gradient: Tensor) -> Tensor:
            rows = slice(t * batch, (t + 1) * batch)
            gradient = torch.ops.aten.tanh_backward(gradient, means[rows])
            return linearized.pull_back(rows, gradient)

        return pull_back

    @torch.no_grad()
    def gradients(self, batch: Batch, config: A2CConfig) -> ActorPass:
        """Return the actor's loss on a batch, and its gradients."""
        inputs, raw_actions = batch.policy_inputs.flatten(0, 1), batch.raw_actions.flatten(1)
        std, num_actions = self.policy.std.unsqueeze(1), raw_actions.numel()
        shares = batch.weights.flatten() / -len(inputs)
        if batch.pathwise is None:
            factors = shares * batch.advantages.flatten()  # dL / d log pi
        else:
            in_actions = batch.pathwise.sensitivities.flatten(1) * shares  # dL / da
        means, z = torch.empty_like(raw_actions), torch.empty_like(raw_actions)
        outputs = torch.empty_like(raw_actions) if config.saturation_coef > 0 else None

        def differentiate(block: Tensor, rows: slice) -> Tensor:
            mean = torch.tanh(block, out=means[:, rows])
            torch.sub(raw_actions[:, rows], mean, out=z[:, rows]).div_(std)
            if batch.pathwise is None:
                gradient = (z[:, rows] * factors[rows]).div_(std)  # dL / d mean
            else:
                gradient = in_actions[:, rows]
            gradient = torch.ops.aten.tanh_backward(gradient, mean)
            if outputs is not None:
                outputs[:, rows] = block
                gradient.add_(block, alpha=2.0 * config.saturation_coef / num_actions)
            return gradient

        parameters = list(self.policy.network.parameters())
        self.passes.read(parameters)
        self.passes.backpropagate(inputs, differentiate)
        if batch.pathwise is None:
            std_gradient = (z.square() - 1.0) @ factors / std.squeeze(1)
        else:
            std_gradient = torch.linalg.vecdot(in_actions, z)
        std_gradient += config.entropy_coef * shares.sum() / std.squeeze(1)
        by_parameter = dict(zip(parameters, self.passes.gradients, strict=True))
        log_std = self.policy.log_std
        by_parameter[log_std] = std_gradient * log_std.exp()
        gradients = [by_parameter[p] if p.requires_grad else None for p in self.policy.parameters()]
        shape, std = batch.raw_actions.shape, std.unsqueeze(2)
        means, z = means.view(shape), z.view(shape)
        log_probs, entropies = log_prob(z, std), entropy(std.movedim(0, -1))
        if batch.pathwise is None:
            steps = log_probs * batch.advantages
        else:
            steps = batch.pathwise.returns
        loss = actor_loss(batch, steps, entropies, outputs, config)
        return ActorPass(loss, means, std, z, log_probs, entropies, gradients)


class ExplicitCritic:
    """A `ValueFunction` as its constructor makes it, on a CPU."""

    def __init__(self, value_function: ValueFunction):
        self.value_function = value_function
        self.passes = ExplicitMLP(value_function.network)

    @torch.no_grad()
    def values(self, weights: dict[str, Tensor], observations: Tensor) -> Tensor:
        """Return values [B, H] at observations [B, H, S] with other weights, by name."""
        names = [name for name, _ in self.value_function.named_parameters()]
        self.passes.read([weights[name] for name in names])
        return self.passes.outputs(observations.flatten(0, 1)).view(observations.shape[:2])

    @torch.no_grad()
    def values_and_slopes(
        self, weights: dict[str, Tensor], observations: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return `values`, and their gradients in the observations, [B, H, S]."""
        names = [name for name, _ in self.value_function.named_parameters()]
        network, inputs = self.value_function.network, observations.flatten(0, 1)
        linearized = LinearizedMLP(network, [weights[name] for name in names], inputs)
        values = linearized.outputs
        slopes = linearized.pull_back(slice(None), torch.ones_like(values))
        return values.view(observations.shape[:2]), slopes.view(observations.shape)

    @torch.no_grad()
    def gradients(self, batch: Batch) -> CriticPass:
        """Return the critic's loss on a batch, and its gradients."""
        inputs, targets = batch.value_inputs.flatten(0, 1), batch.value_targets.flatten()
        shares = batch.weights.flatten() / len(inputs)
        values = torch.empty_like(targets)

        def differentiate(block: Tensor, rows: slice) -> Tensor:
            values[rows] = block.squeeze(0)
            return (block - targets[rows]) * shares[rows]

        parameters = list(self.value_function.parameters())
        self.passes.read(parameters)
        self.passes.backpropagate(inputs, differentiate)
        values = values.view_as(batch.value_targets)
        gradients = [
            gradient if p.requires_grad else None
            for p, gradient in zip(parameters, self.passes.gradients, strict=True)
        ]
        return CriticPass(critic_loss(batch, values), values, gradients)


def actor_passes(
    policy: nn.Module, normalizer: Normalizer, last: ExplicitActor | AutogradActor | None
) -> ExplicitActor | AutogradActor:
    """Return the passes of a policy as it is now: on a CPU written out for a `GaussianPolicy` that
    its constructor made so.

    Args:
        last: what this returned before, to be used again where it fits.
    """
    if not (_is_on_cpu(policy) and isinstance(policy, GaussianPolicy) and is_as_built(policy)):
        return AutogradActor(policy, normalizer)
    if isinstance(last, ExplicitActor) and last.policy is policy:
        if last.passes.fits(policy.network):
            return last
    return ExplicitActor(policy)


def critic_passes(
    value_function: nn.Module, last: ExplicitCritic | AutogradCritic | None
) -> ExplicitCritic | AutogradCritic:
    """Return the same of a value function and `ValueFunction`."""
    module = value_function
    if not (_is_on_cpu(module) and isinstance(module, ValueFunction) and is_as_built(module)):
        return AutogradCritic(module)
    if isinstance(last, ExplicitCritic) and last.value_function is module:
        if last.passes.fits(module.network):
            return last
    return ExplicitCritic(module)


def is_as_built(module: nn.Module) -> bool:
    """Whether a policy or value function is this library's, computes what its constructor made it
    for, and no hook sees its gradients."""
    if type(module) not in (GaussianPolicy, ValueFunction):
        return False
    if change(module, module.built) is not None:
        return False
    for part in parts(module):
        if part._backward_hooks or part._backward_pre_hooks:
            return False
        for p in part._parameters.values():
            if p._backward_hooks or p._post_accumulate_grad_hooks:
                return False
    return True


def _is_on_cpu(module: nn.Module) -> bool:
    return next(module.parameters()).device.type == "cpu"
