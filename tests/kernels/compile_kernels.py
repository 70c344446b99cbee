"""Compile every kernel at every shipped block size for given GPUs, without one; print one JSON row
per kernel.

Run as a script, without TRITON_INTERPRET: the interpreter replaces the kernels when it is on. The
launchers themselves are called, on host tensors, and what they launch is recorded.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator

import torch
from launches import compiled, recorded

from polygrad_fast.config import SamplerConfig
from polygrad_fast.kernels import (
    generalized_advantages,
    guided_step,
    initial_state,
    refresh,
    residual_mlp,
)
from polygrad_fast.kernels.denoiser_input import ActionSpace
from polygrad_fast.kernels.policy_mean import MAX_ONE_LAYER_STATE_DIM, PolicyOperands
from polygrad_fast.kernels.precision import PRECISIONS
from polygrad_fast.kernels.step_table import step_options


def layer_launches() -> Iterator[str]:
    """Launch every tile size of the layer in the roles it ships in, paper-sized (H = 10, Walker2d),
    and the hidden layer of other widths and of the paper's network (no LayerNorm); yield a name
    after each."""

    def launch(role, precision, rows, width=1024, in_dim=256, out_dim=190, paper=False):
        setting = PRECISIONS[precision]
        x, out = torch.empty(rows, width), torch.empty(rows, width)
        operand = out
        if setting.dtype != torch.float32:
            operand = torch.empty(rows, width, dtype=setting.dtype)
        gamma = torch.empty(width)
        weight = torch.empty(max(width, out_dim), width, dtype=setting.dtype)
        moments = torch.empty(residual_mlp.moments_shape(precision, rows, width))
        read = dict(relu=True) if paper else dict(relu=True, norm=(moments, gamma, gamma, 1e-5))
        written = dict(
            operand_out=None if operand is out else operand,
            moments_out=None if paper else moments,
            blocks=residual_mlp.layer_blocks(precision, rows, width, writes_moments=True),
        )
        if role == "input":
            arguments = dict(
                x=torch.empty(rows, in_dim, dtype=setting.dtype),
                weight=torch.empty(width, in_dim, dtype=setting.dtype),
                out=out,
                **written,
            )
        elif role == "hidden":
            arguments = dict(x=operand, weight=weight[:width], out=out, residual=x)
            arguments |= read | written
        else:
            arguments = dict(x=operand, weight=weight[:out_dim], out=torch.empty(rows, out_dim))
            arguments |= read
        residual_mlp.residual_mlp_layer(precision=precision, bias=gamma, **arguments)
        blocks = arguments.get("blocks") or residual_mlp.layer_blocks(
            precision, rows, out_dim, writes_moments=False
        )
        tile = f"{blocks.block_m}x{blocks.block_n}x{blocks.block_k}"
        name = f"layer {role} {precision} {tile}" + (" paper" if paper else "")
        return name + ("" if width == 1024 else f" W={width}")

    for precision in PRECISIONS:
        for rows in (256, 16384):
            for role in ("input", "hidden", "output"):
                if precision == "bfloat16" and role != "hidden":
                    continue  # the same machine code but for the operands' type
                yield launch(role, precision, rows)
    for precision, rows in (
        ("float32", 16384),
        ("tf32", 256),
        ("float16", 256),
        ("float16", 16384),
    ):
        yield launch("hidden", precision, rows, paper=True)
        for width in (50, 512, 2048):
            yield launch("hidden", precision, rows, width)
    yield launch("output", "float16", 1024, 2048, out_dim=3800)


def step_launches() -> Iterator[str]:
    """Launch every tile size of the guided step with a paper-sized policy, also with the paper's
    options and with one layer of the widest states it may have, and the initial state; yield a name
    after each."""
    action_dim, hidden, num_steps = 6, 256, 128
    vector = torch.empty(action_dim)
    space = ActionSpace(vector, vector, vector, vector)
    for precision, operand_dtype in (
        ("float32", torch.float32), ("tf32", torch.float32), ("float16", torch.float16)
    ):  # fmt: skip
        for state_dim, pair in guided_step.STEP_BLOCKS[precision].items():
            if state_dim == 16 and precision != "float16":
                continue  # the same tiles as at 32
            state_dim = 19 if state_dim == 32 else state_dim - 1  # 19: Walker2d
            for blocks in dict.fromkeys(pair):
                rows = 10240
                batch, horizon = rows // 10, 10
                trajectory = torch.empty(batch, horizon, state_dim)
                actions = torch.empty(batch, horizon, action_dim)
                stride = -(-horizon * (state_dim + action_dim) // 16) * 16
                official, paper = SamplerConfig.official(), SamplerConfig.paper()
                exact = SamplerConfig.official(
                    action_update="exact", denoiser_actions="clipped", clip_state_change=None
                )
                common = dict(
                    table=torch.empty(num_steps, 8),
                    space=space,
                    seed=torch.empty(2, dtype=torch.int64),
                    noise=None,
                    trajectory_out=trajectory,
                    actions_out=actions,
                    denoiser_input=torch.empty(batch, stride, dtype=operand_dtype),
                    initial_observations=torch.empty(batch, state_dim - 2),
                )
                cases = [(2, 64, official)]
                if state_dim == 19:
                    cases += [(1, 64, official), (2, 0, official), (2, 64, exact), (2, 0, exact)]
                    cases += [(2, 64, paper)] * (blocks == pair[1] and precision == "float16")
                elif state_dim + 1 == MAX_ONE_LAYER_STATE_DIM:
                    cases += [(1, 64, official)]
                for num_layers, k, config in cases:
                    options = step_options(config)
                    policy = PolicyOperands(
                        first_weight=torch.empty(hidden, -(-(state_dim - 2) // 16) * 16),
                        hidden_weight=torch.empty(hidden, hidden, dtype=operand_dtype),
                        vectors=torch.empty(2, 3, hidden),
                        last_weight=torch.empty(action_dim, hidden),
                        last_bias=vector,
                        std=vector,
                        num_layers=num_layers,
                        eps=1e-3,
                        precision=precision,
                    )
                    guided_step.guided_step(
                        trajectory, trajectory, actions, k=k, policy=policy, options=options,
                        guidance_scale=torch.empty(1), blocks=blocks, **common,
                    )  # fmt: skip
                    name = f"guided_step {precision} D={state_dim} layers={num_layers} "
                    name += f"rows={blocks.block_rows}" + ("" if k else " last")
                    name += {official: "", paper: " paper", exact: " exact"}[config]
                    yield name
            if precision == "float16" and state_dim in (19, 511):
                initial_state.initial_state(options=options, **common)
                yield f"initial_state {precision} D={state_dim}"


def advantage_launches() -> Iterator[str]:
    """Launch generalized advantages of contiguous trajectories, and of transposed ones; yield a
    name after each."""
    rewards = torch.empty(1024, 10)
    for name, values in (("", rewards), (" transposed", torch.empty(10, 1024).t())):
        generalized_advantages.generalized_advantages(rewards, values, rewards, 0.99, 0.9)
        yield f"generalized_advantages{name}"


def refresh_launches() -> Iterator[str]:
    """Launch the refresh of weights; yield its name."""
    refresh.refresh(torch.empty(1, refresh.NUM_COLUMNS.value, dtype=torch.int64))
    yield "refresh"


def main(architecture: int, only: str = "") -> None:
    """Print one row per kernel whose name matches the regular expression `only`."""
    with recorded(architecture) as launches:
        launched = layer_launches, step_launches, advantage_launches, refresh_launches
        names = [name for launches_of in launched for name in launches_of()]
    chosen = [pair for pair in zip(names, launches, strict=True) if re.search(only, pair[0])]
    rows = compiled([launch for _, launch in chosen], architecture, jobs=1)
    for (name, _), row in zip(chosen, rows, strict=True):
        print(json.dumps({"kernel": name, **row}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:3])
