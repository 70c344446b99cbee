"""Updates of the offline agents, TD3+BC and IQL, on batches of transitions.

    pytest benchmarks/bench_offline_agents.py --benchmark-only --rows rows.jsonl

Beside each: the same update as one would write it down, a module per network, an optimizer per
module and autograd; and the update's matrix products alone, each into a buffer of its own. The
first, in float64, is also what an update is held against: losses, and the steps of the weights.
"""

import copy
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from bench_training import relative_norm

from harness.work import Work, parameter_bytes, tensor_bytes
from polygrad_fast.learners import IQL, TD3BC
from polygrad_fast.learners.networks import relu_mlp
from polygrad_fast.transitions import Transitions

HOPPER = {"observation_dim": 11, "action_dim": 3}
AGENTS = {"td3_bc": TD3BC, "iql": IQL}


def agent_cases(setting):
    """Return agents and batches; 256 is the released one."""
    batch = 8 if setting.smoke else 256
    return [(1, {"agent": agent, "batch": batch}) for agent in AGENTS]


def networks_of(modules: dict, prefix: str, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """Return copies of an agent's networks, or of its targets, the twin critics as two."""
    networks = {}
    for name in ("policy", "value_function"):
        if f"{prefix}{name}" in modules:
            networks[name] = copy.deepcopy(modules[f"{prefix}{name}"]).to(dtype)
            networks[name].requires_grad_()
    critics = modules[f"{prefix}critics"]
    for k in range(2):
        network = relu_mlp(*critics.kernels[0].shape[1:], 1).to(critics.kernels[0].device, dtype)
        for linear, kernel, bias in zip(network[::2], critics.kernels, critics.biases, strict=True):
            linear.weight.data = kernel[k].detach().T.to(dtype).contiguous()
            linear.bias.data = bias[k, 0].detach().to(dtype).clone()
        networks[f"q{k + 1}"] = network
    return networks


class Plain:
    """An agent's update written down plainly, from a copy of the agent's weights."""

    def __init__(self, agent, dtype: torch.dtype):
        self.config, self.dtype = agent.config, dtype
        modules = agent.modules()
        self.trained = networks_of(modules, "", dtype)
        self.targets = networks_of(modules, "target_", dtype)
        options = {"lr": self.config.learning_rate, "eps": self.config.adam_eps}
        self.optimizers = {
            name: torch.optim.Adam(network.parameters(), **options)
            for name, network in self.trained.items()
        }

    def update(self, batch: Transitions, noise: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Return the losses of an update."""
        with torch.no_grad():
            for name, target in self.targets.items():
                source = self.trained[name].parameters()
                for slow, fast in zip(target.parameters(), source, strict=True):
                    slow.mul_(1 - self.config.polyak).add_(fast, alpha=self.config.polyak)
        fields = ("observations", "actions", "rewards", "next_observations", "terminals")
        parts = [getattr(batch, field).to(self.dtype) for field in fields]
        return self.td3_bc(*parts, noise) if noise is not None else self.iql(*parts)

    def step(self, name: str, loss: torch.Tensor) -> torch.Tensor:
        self.optimizers[name].zero_grad()
        loss.backward()
        self.optimizers[name].step()
        return loss.detach()

    def td3_bc(self, s, a, r, next_s, done, noise):
        config, policy = self.config, self.trained["policy"]
        chosen = policy(s)
        q = self.trained["q1"](torch.cat((s, chosen), dim=1))
        weight = config.alpha / (q.detach().abs().mean() + 1e-7)
        actor_loss = self.step("policy", F.mse_loss(chosen, a) - weight * q.mean())
        losses = {"q1": [], "q2": []}
        for normals in noise.to(self.dtype):
            with torch.no_grad():
                shift = (config.policy_noise * normals).clamp(-config.noise_clip, config.noise_clip)
                next_a = (self.targets["policy"](next_s) + shift).clamp(-1, 1)
                pairs = torch.cat((next_s, next_a), dim=1)
                next_q = torch.minimum(self.targets["q1"](pairs), self.targets["q2"](pairs))
                y = r[:, None] + config.gamma * (1 - done[:, None]) * next_q
            for name, found in losses.items():
                loss = F.mse_loss(self.trained[name](torch.cat((s, a), dim=1)), y)
                found.append(self.step(name, loss))
        means = {f"{name}_loss": torch.stack(found).mean() for name, found in losses.items()}
        return means | {"actor_loss": actor_loss}

    def iql(self, s, a, r, next_s, done):
        config, value = self.config, self.trained["value_function"]
        pairs = torch.cat((s, a), dim=1)
        with torch.no_grad():
            target = torch.minimum(self.targets["q1"](pairs), self.targets["q2"](pairs))
            y = r[:, None] + config.gamma * (1 - done[:, None]) * value(next_s)
        advantage = target - value(s)
        share = torch.where(advantage < 0, 1 - config.expectile, config.expectile)
        losses = {"value_loss": self.step("value_function", (share * advantage.square()).mean())}
        losses["q_loss"] = sum(  # the loss is one mean over both critics
            self.step(name, F.mse_loss(self.trained[name](pairs), y) / 2) for name in ("q1", "q2")
        )
        weight = (config.beta * advantage.detach()).exp().clamp(max=config.max_weight)
        normal = torch.distributions.Normal(*self.trained["policy"](s))
        log_prob = normal.log_prob(a).sum(1, keepdim=True)
        losses["actor_loss"] = self.step("policy", -(weight * log_prob).mean())
        return losses


def parameters(networks: dict[str, torch.nn.Module]) -> list[torch.Tensor]:
    """Return copies of the networks' parameters."""
    return [p.detach().clone() for network in networks.values() for p in network.parameters()]


def update_errors(agent, batch: Transitions, noise, updates: int = 3) -> dict[str, float]:
    """Take the agent's first updates and return the relative errors of the last one's losses, and
    of how far weights and targets have moved, from the same in float64."""
    exact = Plain(agent, torch.float64)
    before = {which: parameters(getattr(exact, which)) for which in ("trained", "targets")}
    for _ in range(updates):
        got = agent.update(batch, **noise)
        wanted = exact.update(batch, noise.get("noise"))
    errors = {name: abs(got[name].double() / loss - 1).item() for name, loss in wanted.items()}
    now = Plain(agent, torch.float64)
    for which, start in before.items():
        mine, theirs = (
            [p - b for p, b in zip(parameters(getattr(agents, which)), start, strict=True)]
            for agents in (now, exact)
        )
        errors[f"steps, {which}"] = relative_norm(mine, theirs)
    return errors


def products(agent, batch: int) -> list[tuple[int, int, int]]:
    """Return the sizes (m, k, n) of an update's matrix products."""
    width = agent.config.hidden_dim
    s, a = agent.policy.observation_dim, agent.policy.action_dim

    def forward(inputs, outputs, rows=batch):
        return [(rows, inputs, width), (rows, width, width), (rows, width, outputs)]

    def weight_gradients(inputs, outputs):
        return [(k, m, n) for m, k, n in forward(inputs, outputs)]

    def input_gradients(inputs, outputs, first=False):
        return [(m, n, k) for m, k, n in forward(inputs, outputs)[0 if first else 1 :]]

    def trained(inputs, outputs):
        parts = forward, weight_gradients, input_gradients
        return list(itertools.chain(*(part(inputs, outputs) for part in parts)))

    if isinstance(agent, IQL):
        found = [*trained(s, a), *trained(s, 1), *forward(s, 1)]
        return found + 2 * trained(s + a, 1) + 2 * forward(s + a, 1)
    found = [*trained(s, a), *forward(s + a, 1), *input_gradients(s + a, 1, first=True)]
    found += forward(s, a)  # the target's actions, which all critic steps share but for the noise
    steps = agent.config.critic_updates
    return found + 2 * steps * (forward(s + a, 1) + trained(s + a, 1))


@pytest.mark.cases(of=agent_cases)
def test_offline_update(bench, agent, batch):
    with bench.case("offline update", "float32", agent=agent, batch=batch) as case:
        generator = torch.Generator().manual_seed(0)
        bounds = [-1.0] * HOPPER["action_dim"], [1.0] * HOPPER["action_dim"]
        learner = AGENTS[agent](HOPPER["observation_dim"], *bounds, generator=generator)
        rows = 1000
        sizes = HOPPER["observation_dim"], HOPPER["action_dim"]
        data = Transitions.from_parts(
            torch.randn(rows, sizes[0], generator=generator),
            torch.rand(rows, sizes[1], generator=generator) * 2 - 1,
            torch.randn(rows, generator=generator),
            torch.randn(rows, sizes[0], generator=generator),
            (torch.rand(rows, generator=generator) < 0.02).float(),
        ).to(bench.device)
        for module in learner.modules().values():
            module.to(bench.device)
        transitions = data.sample(batch, generator)
        shape = (getattr(learner.config, "critic_updates", 0), batch, sizes[1])
        normals = torch.randn(shape, generator=generator).to(bench.device)
        noise = {"noise": normals} if agent == "td3_bc" else {}
        for name, error in update_errors(learner, transitions, noise).items():
            case.check(name, error, 1e-3 if "steps" in name else 1e-5)

        plain = Plain(learner, torch.float32)
        multiplied = products(learner, batch)
        operands = [
            (torch.randn(m, k, device=bench.device), torch.randn(k, n, device=bench.device),
             torch.empty(m, n, device=bench.device))
            for m, k, n in multiplied
        ]  # fmt: skip

        def multiply():
            for left, right, out in operands:
                torch.mm(left, right, out=out)

        flops = sum(2 * m * k * n for m, k, n in multiplied)
        moved = 6 * parameter_bytes(*learner.modules().values()) + tensor_bytes(transitions.rows)
        case.time(
            functools.partial(learner.update, transitions, **noise),
            1,
            "update",
            Work(flops, moved),
            beside={
                "plain": functools.partial(plain.update, transitions, noise.get("noise")),
                "products": multiply,
            },
            seconds=3.0,
        )
