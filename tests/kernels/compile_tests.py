"""Compile what tests would launch on a GPU, those marked gpu too, without one.

    export PYTHONPATH=tests:tests/kernels:benchmarks
    python -O tests/kernels/compile_tests.py 90 TESTS... [--jobs 2] [--all]

Prints a JSON row per launch that differs from those before. The tests run on a CUDA device that is
imitated (`fake_cuda`), where kernels are recorded and not launched, so that nothing they compute is
right: -O takes their assertions away. Any other error is one. Without --all only some launches are
compiled, such that of every argument, constant or specialized on, every value occurs.

Run as a script, without TRITON_INTERPRET. With another triton on PYTHONPATH (`pip install --target
DIR triton==3.6.0`) it compiles with that.
"""

from __future__ import annotations

import argparse
import json
import sys

import fake_cuda
import pytest
import torch
import triton
from launches import Launch, compiled, recorded


class Plugin:
    """Notes which test launched what."""

    def __init__(self, launches: list[Launch]):
        self.launches, self.first = launches, {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item, nextitem):
        result = yield
        for launch in self.launches:
            self.first.setdefault((launch.name, launch.specialization), (launch, item.nodeid))
        self.launches.clear()
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        if hasattr(item.module, "UPDATES"):
            item.module.UPDATES = 1  # training changes no launch
        return (yield)


def covering(launches: list[Launch]) -> list[int]:
    """Return the indices of launches in which everything occurs that occurs in all: greedily, those
    first that add most."""
    facts = []
    for launch in launches:
        kept = json.loads(launch.specialization)
        keys = map(tuple, kept["constant_keys"])
        constants = dict(zip(keys, kept["constant_vals"], strict=True))
        attributes = {tuple(k) for k in kept["attrs_keys"]}
        found = {(launch.name, "warps", kept["options"]["num_warps"])}
        for index, (name, kind) in enumerate(kept["signature"].items()):
            value = str(constants.get((index,)))
            found.add((launch.name, name, kind, value, (index,) in attributes))
        facts.append(found)
    missing, chosen = set().union(*facts), []
    while missing:
        best = max(range(len(facts)), key=lambda i: len(facts[i] & missing))
        missing -= facts[best]
        chosen.append(best)
    return chosen


def main() -> int:
    """Record, compile, print; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architecture", type=int)
    parser.add_argument("tests", nargs="+")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args()
    torch.testing.assert_close = lambda *args, **kwargs: None
    arguments = ["-q", "--assert=plain", "-p", "no:cacheprovider", *options.tests]
    with recorded(options.architecture) as launches, fake_cuda.installed():
        plugin = Plugin(launches)
        code = pytest.main(arguments, plugins=[plugin])
    if code:
        return int(code)
    first = list(plugin.first.values())
    unique = [launch for launch, _ in first]
    chosen = range(len(unique)) if options.all else covering(unique)
    print(json.dumps({"triton": triton.__version__, "recorded": len(unique)}), flush=True)
    rows = compiled([unique[i] for i in chosen], options.architecture, options.jobs)
    for i, row in zip(chosen, rows, strict=True):
        print(json.dumps({"kernel": unique[i].name, "test": first[i][1], **row}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
