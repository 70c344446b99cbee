"""Rows, sessions, reports: what stands around the benchmarks, without measuring anything."""

import contextlib
import dataclasses
import json
import math
import os
import subprocess
import sys

import pytest
import torch

import report as script
from harness import figures, report, sampler_case
from harness import rows as rows_module
from harness.rows import (
    Check,
    Row,
    RowFile,
    code_changed,
    provenance,
    read_folder,
    read_rows,
    write_rows,
)
from harness.session import NotMeasured, Session
from harness.timing import interleaved, repeated
from harness.work import Ceilings, Work
from polygrad_fast.errors import InputError
from polygrad_fast.sampling.reference_engine import ReferenceEngine, diffusion_step

CPU = torch.device("cpu")
FACTS = dataclasses.asdict(provenance(CPU, "pytest benchmarks/", commit="a" * 40)) | {"threads": 1}
EPYC = {"processor": "AMD EPYC", "processor_vendor": "AuthenticAMD", "processor_family": 26,
        "processor_model": 2, "instruction_sets": "avx2 avx512f avx512_bf16"}  # fmt: skip
XEON = {"processor": "Xeon", "processor_vendor": "GenuineIntel", "processor_family": 6,
        "processor_model": 143, "instruction_sets": "avx2 avx512f amx_bf16"}  # fmt: skip
PASSED = (Check("largest error", 1e-6, 1e-4),)


def make_row(**changes) -> Row:
    values = {
        **FACTS,
        "benchmark": "sample",
        "dtype": "float32",
        "case": {"engine": "torch", "denoiser": "residual_mlp", "batch": 64, "horizon": 10,
                 "steps": 128},
        "status": "ok",
        "checks": PASSED,
        "ms": 640.0,
        "items": 64,
        "item": "trajectory",
    }  # fmt: skip
    return Row(**values | changes)


def sampled(engine="torch", dtype="float32", batch=64, horizon=10, **changes) -> Row:
    case = make_row().case | {"engine": engine, "batch": batch, "horizon": horizon}
    return make_row(dtype=dtype, case=case | changes.pop("case", {}), **changes)


def make_session(tmp_path, commit="a" * 40, small=True, **options) -> Session:
    file = RowFile(tmp_path / "rows.jsonl")
    made = lambda device: provenance(device, None, commit)  # noqa: E731
    return Session(CPU, file, made, small=small, **options)


def test_rows_come_back_as_they_were(tmp_path):
    rows = [sampled(), sampled("reference", values={"hidden_dim": 32})]
    write_rows(tmp_path / "a.jsonl", rows)
    assert read_rows(tmp_path / "a.jsonl") == rows
    assert read_folder(tmp_path) == rows
    assert os.listdir(tmp_path) == ["a.jsonl"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"status": "fine"}, "status 'fine'"),
        ({"checks": ()}, "not the checks passed before it"),
        ({"checks": (Check("x", 2.0, 1.0),)}, "not the checks passed before it"),
        ({"checks": (Check("x", None, 1.0),)}, "not the checks passed before it"),
        ({"status": "wrong"}, "not the checks passed before it"),
        ({"ms": 0.0}, "wanted a positive time"),
        ({"tflops": math.nan}, "tflops nan"),
        ({"values": {"gemms_ms": math.inf}}, "gemms_ms inf"),
        ({"values": {"gemms_ms": "x"}}, "gemms_ms 'x', wanted a number"),
        ({"case": {"batch": [1]}}, r"batch is \[1\], wanted a number or a string"),
        ({"case": {"batch": None}}, "batch is None"),
        ({"ms": None}, "neither a time nor other values"),
    ],
)
def test_a_row_that_cannot_be_right_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        make_row(**changes)


def without(name):
    return lambda data: data.pop(name)


@pytest.mark.parametrize(
    "damage, message",
    [
        (without("commit"), "lacks commit"),
        (without("ms"), "neither a time nor other values"),
        (without("ms_min"), None),
        (lambda data: data.update(values={"x_ms": True}), "x_ms True"),
        (lambda data: data.update(checks=[{"name": "x", "value": "0", "allowed": 1}]), "check is"),
        (lambda data: data.update(ms=math.nan), "wanted a positive time"),
        (lambda data: data.update(speed=1), "unknown speed"),
        (lambda data: data.update(threads="one"), "threads is 'one'"),
        (lambda data: data.update(threads=True), "threads is True"),
        (lambda data: data.update(case=[1]), r"case is \[1\]"),
        (lambda data: data.update(checks=3), "checks are 3"),
        (lambda data: data.update(checks=[{"name": "x"}]), "check is"),
        (lambda data: data.update(checks=[]), "not the checks passed"),
        (lambda data: data.update(ms=1), None),
    ],
)
def test_damaged_rows_are_named_with_their_line(tmp_path, damage, message):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [sampled("reference"), sampled()])
    first, second = path.read_text().splitlines()
    data = json.loads(second)
    damage(data)
    path.write_text(f"{first}\n{json.dumps(data)}\n")
    if message is None:
        assert len(read_rows(path)) == 2
        return
    with pytest.raises(InputError, match=f"rows.jsonl, line 2: .*{message}"):
        read_rows(path)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="holds no rows"):
        read_folder(tmp_path)
    with pytest.raises(InputError, match="cannot read .*none"):
        read_rows(tmp_path / "none")
    (tmp_path / "a.jsonl").write_text('{"date": "20')
    with pytest.raises(InputError, match="a.jsonl, line 1"):
        read_folder(tmp_path)
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(InputError, match="a.jsonl is empty"):
        read_folder(tmp_path)
    write_rows(tmp_path / "a.jsonl", [sampled()])
    write_rows(tmp_path / "b.jsonl", [sampled(ms=3.0)])
    with pytest.raises(InputError, match="both hold a row of sample engine=torch"):
        read_folder(tmp_path)
    (tmp_path / "b.jsonl").write_text((tmp_path / "a.jsonl").read_text() * 2)
    with pytest.raises(InputError, match="b.jsonl, line 2: a second row"):
        read_rows(tmp_path / "b.jsonl")


def test_a_new_row_takes_the_place_of_the_old_one(tmp_path):
    path = tmp_path / "rows.jsonl"
    file = RowFile(path)
    file.add(sampled("reference"))
    file.add(sampled(ms=640.0))
    file.add(sampled("reference", ms=900.0))
    assert [row.ms for row in read_rows(path)] == [900.0, 640.0]
    again = RowFile(path)
    again.add(sampled(ms=500.0, threads=7))  # another machine
    assert [row.ms for row in read_rows(path)] == [900.0, 640.0, 500.0]
    assert again.holds(sampled()) and not again.holds(sampled(commit="b" * 40))
    assert not again.holds(sampled(dirty=True)) and not again.holds(sampled(smoke=True))
    assert [row.ms for row in again.added] == [500.0]


def test_new_rows_do_not_make_the_code_another(tmp_path):
    """A second row of a session, or the next command's first, is of the commit as it is."""

    def git(*words: str) -> None:
        identity = "-c", "user.name=x", "-c", "user.email=x@x"
        subprocess.run(["git", "-C", tmp_path, *identity, *words], check=True, capture_output=True)

    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    for path in (tmp_path / "code.py", results / "rows.jsonl"):
        path.write_text("old")
    assert code_changed(tmp_path)  # no repository: unknown
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    assert not code_changed(tmp_path)
    (results / "rows.jsonl").write_text("new")
    assert not code_changed(tmp_path)
    git("add", ".")
    assert not code_changed(tmp_path)
    (tmp_path / "code.py").write_text("new")
    assert code_changed(tmp_path)


def test_a_commit_is_dirty_by_its_code_only(monkeypatch):
    found = rows_module.versions() | {"git_commit": f"{'b' * 40}-dirty"}
    monkeypatch.setattr(rows_module, "versions", lambda: found)
    for changed in (True, False):
        monkeypatch.setattr(rows_module, "code_changed", lambda checkout, changed=changed: changed)
        facts = provenance(CPU, None)
        assert (facts.commit, facts.dirty) == ("b" * 40, changed)
    facts = provenance(CPU, None, commit="c-dirty")
    assert (facts.commit, facts.dirty) == ("c", True)


def test_a_write_that_fails_keeps_the_old_rows(tmp_path, monkeypatch):
    file = RowFile(tmp_path / "rows.jsonl")
    file.add(sampled())
    before = (tmp_path / "rows.jsonl").read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        file.add(sampled("reference"))
    assert (tmp_path / "rows.jsonl").read_bytes() == before
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_a_session_makes_a_row_of_whatever_happens(tmp_path):
    session = make_session(tmp_path)
    with session.case("a", "float32", size=1) as case:
        case.check("error", 0.5, 1.0)
        case.time(lambda: None, 3, "thing", Work(10, 20), beside={"other": lambda: None}, width=7)
    with session.case("b", "float32") as case:
        case.check("error", 2.0, 1.0)
        raise AssertionError("not reached")
    with session.case("c", "float32") as case:
        case.check("error", math.nan, 1.0)
    with session.case("i", "float32") as case:
        case.check("error", 0.5, math.nan)
    with session.case("d", "float32"):
        raise InputError("no such engine")
    with session.case("e", "float32"):
        raise torch.OutOfMemoryError("no room\nmore")
    with session.case("f", "float32") as case:
        case.time(lambda: None, 1, "thing")
    with session.case("g", "float32"):
        pass
    with session.case("h", "float32") as case:
        case.check("error", 0.0, 1.0)
        case.time(lambda: None, 1, "thing", Work(10, 20))
        raise RuntimeError("after the time")
    rows = {row.benchmark: row for row in read_rows(tmp_path / "rows.jsonl")}
    first = rows.pop("a")
    assert first.status == "ok" and first.ms > 0 and first.items == 3 and first.error is None
    assert first.flops == 10 and first.tflops > 0 and first.gb_per_s > 0
    assert first.peak_tflops > 0 and first.peak_gb_per_s > 0
    assert first.share_of_floor == pytest.approx(first.floor_ms / first.ms)
    assert set(first.values) == {"other_ms", "width"}
    assert {n: row.status for n, row in rows.items()} == {
        "b": "wrong", "c": "wrong", "d": "not offered", "e": "out of memory", "f": "error",
        "g": "error", "h": "error", "i": "wrong",
    }  # fmt: skip
    assert all(row.ms is row.tflops is None and row.error for row in rows.values())
    assert rows["c"].checks == (Check("error", None, 1.0),)
    assert "before any check" in rows["f"].error and rows["e"].error == "no room"


def test_a_session_leaves_out_what_is_stored_or_too_late(tmp_path):
    session = make_session(tmp_path)
    with session.case("a", "float32") as case:
        case.check("error", 0.0, 0.0)
        case.time(lambda: None, 1, "thing")
    with pytest.raises(NotMeasured, match="stored"):
        with make_session(tmp_path, resume=True).case("a", "float32"):
            raise AssertionError
    for keep_dirty in (False, True):
        session = make_session(
            tmp_path, resume=True, keep_dirty=keep_dirty, commit=f"{'a' * 40}-dirty"
        )
        for _ in range(2):
            with contextlib.suppress(NotMeasured), session.case("dirty", "float32") as case:
                case.check("error", 0.0, 0.0)
                case.time(lambda: None, 1, "thing")
        assert len(session.rows.added) == (0 if keep_dirty else 2)
    with pytest.raises(NotMeasured, match="time budget of 0 s"):
        with make_session(tmp_path, time_budget=0.0).case("b", "float32"):
            raise AssertionError
    assert len(read_rows(tmp_path / "rows.jsonl")) == 2


class FakeClock:
    """10 ms per call, 20 ms for the others beside it."""

    name = "fake"

    def __call__(self, call):
        call()
        return 20.0 if call is other else 10.0


def other():
    pass


def test_what_a_time_becomes(tmp_path, monkeypatch):
    """Work and milliseconds are those of one of the four operations of a call."""
    monkeypatch.setattr("harness.session.clock_of", lambda device: FakeClock())
    session = make_session(tmp_path, small=False)
    monkeypatch.setattr(session.ceilings(CPU), "_fastest", lambda calls, count: 1.0)
    with session.case("a", "float32") as case:
        case.check("error", 0.5, 1.0)
        case.time(lambda: None, 5, "thing", Work(1e6, 2e6), 4, {"other": other}, seconds=0.12)
    (row,) = session.rows.added
    assert (row.status, row.error, row.clock, row.calls, row.repeats) == ("ok", None, "fake", 4, 4)
    assert row.ms == row.ms_min == row.ms_max == 2.5 and row.values == {"other_ms": 5.0}
    assert row.tflops == 1e6 / 2.5e-3 / 1e12 and row.gb_per_s == 2e6 / 2.5e-3 / 1e9
    assert row.us_per_item == 500.0
    assert row.peak_tflops == pytest.approx(2 * 1024**3 / 1e-3 / 1e12)
    assert row.peak_gb_per_s == pytest.approx(2**21 / 1e-3 / 1e9)
    assert row.floor_ms == pytest.approx(2e6 / 2**21) and case.times == [2.5] * 4
    assert row.share_of_floor == pytest.approx(row.floor_ms / 2.5)


def test_medians(tmp_path, monkeypatch):
    calls = iter([9.0, 4.0, 8.0, 7.0])  # the first warms up
    clock = lambda call: next(calls)  # noqa: E731
    clock.name = "fake"
    monkeypatch.setattr("harness.session.clock_of", lambda device: clock)
    session = make_session(tmp_path, small=False)
    with session.case("a", "float32") as case:
        case.check("error", 0.0, 0.0)
        case.time(lambda: None, 1, "thing", seconds=0.01)
    (row,) = session.rows.added
    assert (row.ms, row.ms_min, row.ms_max, row.calls) == (7.0, 4.0, 8.0, 3)


@pytest.mark.parametrize("work, kind", [(Work(2.2e12), "products"), (Work(bytes=2e10), "copy")])
def test_a_time_too_short_for_the_work_is_refused(tmp_path, monkeypatch, work, kind):
    monkeypatch.setattr("harness.session.clock_of", lambda device: FakeClock())
    session, measured = make_session(tmp_path, small=False), []
    monkeypatch.setattr(
        session.ceilings(CPU), "_fastest", lambda *_: measured.append(1) or 10 * 2**20 / 1e6
    )
    with session.case("a", "float32") as case:
        case.check("error", 0.0, 0.0)
        case.time(lambda: None, 1, "thing", work, seconds=0.01)
    (row,) = session.rows.added
    assert row.status == "wrong" and row.ms is None and len(measured) == 2
    assert f"of what the {kind} counted as its work take" in row.error


def test_what_is_wrong_after_the_times_has_none(tmp_path):
    session = make_session(tmp_path)
    with session.case("a", "float32") as case:
        case.check("error", 0.0, 0.0)
        case.time(lambda: None, 1, "thing", after=lambda: case.check("later", 1.0, 0.5))
    (row,) = session.rows.added
    assert row.status == "wrong" and row.ms is None and case.times == [] and row.smoke


def test_calls_are_timed_in_turns():
    order, milliseconds = [], {"a": 2.0, "b": 3.0}

    def clock(call):
        call()
        return milliseconds[order[-1]]

    calls = {name: lambda name=name: order.append(name) for name in milliseconds}
    times = interleaved(calls, clock, seconds=0.02)
    assert times == {"a": [2.0] * 4, "b": [3.0] * 4}
    assert order == ["a", "b"] * 5  # the first round does not count
    for seconds in (0.0049, 0.0017):  # a round takes 5 ms: up to three times as long as asked
        assert interleaved(calls, clock, seconds=seconds) == {"a": [2.0] * 3, "b": [3.0] * 3}
    assert interleaved(calls, clock, seconds=0.0016) == {"a": [2.0], "b": [3.0]}
    count = []
    repeated(lambda: count.append(1) or torch.zeros(1), 4, CPU)()
    assert len(count) == 4


def test_ceilings_are_those_of_the_fastest_call(monkeypatch):
    counts = []
    monkeypatch.setattr(Ceilings, "_fastest", lambda self, calls, count: counts.append(count) or 2)
    ceilings = Ceilings(CPU)
    assert ceilings.tflops("float32") == 2 * 1024**3 / 2 / 1e9
    assert ceilings.gb_per_s(3 * 2**20) == 4 * 2**20 / 2 / 1e6  # the nearest power of two
    assert ceilings.gb_per_s(1) == 2**20 / 2 / 1e6 and ceilings.gb_per_s(1e12) == 2**28 / 2 / 1e6
    assert counts == [1, 16, 64, 1]
    assert ceilings.floors_ms(Work(bytes=2**20), "float32") == {"products": None, "copy": 2.0}
    assert ceilings.floor_ms(Work(3 * 1024**3, 2**20), "float32") == 3.0


def test_floors():
    ceilings = Ceilings(CPU, small=True)
    assert ceilings.floor_ms(Work(), "float32") is None
    assert ceilings.tflops("no dtype") is None
    slow = ceilings.floor_ms(Work(flops=1e12, bytes=1), "float32")
    assert slow == pytest.approx(1e3 / ceilings.tflops("float32"))
    slow = ceilings.floor_ms(Work(flops=1, bytes=1e9), "float32")
    assert slow == pytest.approx(1e3 / ceilings.gb_per_s(1e9))


def test_flops_of_the_paper():
    """6.74 M multiply-adds per trajectory and step in the denoiser, 71 k per row in the policy."""
    c = sampler_case.build(sampler_case.Sizes(), 10, CPU)
    denoiser, policy = 250 * 1024 + 6 * 1024**2 + 1024 * 190, 17 * 256 + 256**2 + 256 * 6
    work = sampler_case.sample_work(c, 1024, "float16")
    assert work.flops == 2 * 1024 * 128 * (denoiser + 10 * policy)
    assert work.flops / 790e9 == pytest.approx(2.47, abs=0.01)  # ms at 790 TFLOP/s
    assert 13e6 < work.bytes < 19e6


def test_flops_of_the_transformer():
    """Every Linear, applied to each of H tokens, and causal attention."""
    denoiser = sampler_case.build(sampler_case.Sizes(), 7, CPU, "transformer").denoiser
    linears = sum(
        module.weight.numel()
        for name, module in denoiser.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.startswith("step_mlp")
    )
    attention = 7 * 8 // 2 * 2 * 6 * 312  # pairs, scores and sums, layers, width
    assert sampler_case.denoiser_flops(denoiser) == 2 * (7 * linears + attention)


class FlawedEngine:
    """The reference, each step's actions off by what plain bfloat16 is off, times a factor."""

    def __init__(self, c, factor):
        self.reference, self.c, self.factor = ReferenceEngine(c), c, factor

    def sample(self, s0, guidance_scale, generator, noise, return_chain):
        x, u = noise.initial_trajectories.clone(), noise.initial_actions
        x[:, 0, : s0.shape[1]] = s0
        chain, num_steps = [], self.c.schedule.num_train_timesteps
        for step in range(num_steps):
            inputs = x, u, s0, num_steps - 1 - step, guidance_scale
            noises = noise.trajectories[step], noise.actions[step]
            exact = diffusion_step(self.c, *inputs, *noises)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                rough = diffusion_step(self.c, *inputs, *noises)
            x, u = (e + self.factor * (r - e) for e, r in zip(exact, rough, strict=True))
            chain.append((x, u))
        return x, u, tuple(map(torch.stack, zip(*chain, strict=True)))


@torch.no_grad()
def test_half_precision_may_err_twice_as_much_as_the_plain_formula():
    c = sampler_case.build(sampler_case.SMALL, 3, CPU)
    s0 = torch.randn(5, c.observation_dim)
    for factor, passes in ((0.0, True), (1.9, True), (2.2, False)):
        engine = FlawedEngine(c, factor)
        error, allowed = sampler_case.step_errors(engine, c, "bfloat16", s0)
        assert (error <= allowed) == passes, (factor, error, allowed)
    assert sampler_case.step_errors(FlawedEngine(c, 0.0), c, "float32", s0)[1] == 1e-4
    nan = torch.tensor([math.nan])
    assert math.isnan(sampler_case.largest_error((s0, nan), (s0, nan)))


def test_compared_steps():
    assert sampler_case.compared_steps(128) == [0, 64, *range(117, 128)]
    assert sampler_case.compared_steps(4) == [0, 1, 2, 3]


MEASURED = [
    sampled("reference", ms=1280.0, values={"hidden_dim": 1024}),
    sampled("torch", ms=640.0, share_of_floor=0.5),
    sampled("torch", "bfloat16", ms=0.32, calls=1),
    sampled("torch", horizon=50, ms=6400.0, values={"hidden_dim": 2048}),
    sampled("triton", "float16", device="cuda", gpu="NVIDIA H200", driver="580", ms=9.0),
    sampled("torch", "float16", status="wrong", ms=None, checks=(Check("one step", 0.02, 0.01),)),
    make_row(
        benchmark="sampler step",
        case={"engine": "torch", "batch": 64, "horizon": 10, "steps": 64},
        ms=6.0,
        values={"gemms_ms": 5.0, "packed_ms": 4.0, "reference_ms": 12.0},
    ),
    make_row(
        benchmark="edm sample",
        case={"engine": "torch", "features": 32, "length": 16, "batch": 256, "steps": 32},
        ms=500.0,
        values={"reference_ms": 2000.0, "convolutions_ms": 800.0, "products_ms": 400.0},
    ),
    make_row(benchmark="A2C update", case={"batch": 1024}, ms=266.0),
    sampled("torch", "bfloat16", horizon=50, status="out of memory", ms=None),
    make_row(benchmark="whole update", case={"preset": "quick", "env_id": "Hopper-v5",
                                             "batch": 128, "engine": "torch"}, ms=5.0,
             values={"env_steps": 4, "denoiser_updates": 3}),
    make_row(benchmark="offline update", case={"agent": "iql", "batch": 256}, ms=5.0,
             share_of_floor=0.6, values={"plain_ms": 8.0, "products_ms": 4.0}),
    make_row(benchmark="offline update", case={"agent": "td3_bc", "batch": 256}, ms=None,
             status="wrong", checks=(Check("steps", 0.02, 0.01),)),
    make_row(benchmark="environment step", case={"env_id": "Hopper-v5"}, ms=0.1,
             values={"bare_ms": 0.08}),
    make_row(benchmark="dynamics replay", case={"env_id": "Hopper-v5", "trajectories": 5,
                                                "horizon": 10}, ms=0.05),
]  # fmt: skip


def test_tables():
    tables = {name: report.build(name, MEASURED) for name in report.TABLES}
    on_cpu, on_gpu = tables["samples"].split("On NVIDIA H200:", 1)
    assert on_cpu.startswith(f"On {MEASURED[0].machine}; `*`: of one call, not a median:\n\n|")
    assert "| denoiser | H | B | reference float32 | torch bfloat16 | torch float32 |" in on_cpu
    assert "| residual mlp | 10 | 64 | 1,280 ms | 320 us* | 640 ms (50%) |" in on_cpu
    assert "| residual mlp | 50 | 64 | not measured | out of memory | 6,400 ms |" in on_cpu
    assert "Hidden widths: residual mlp 1024 (H = 10), 2048 (H = 50)." in on_cpu
    assert "| residual mlp | 10 | 64 | 9 ms |" in on_gpu and "one call" not in on_gpu
    steps = tables["sampler_cpu"]
    assert "| float32 | 64 | 64 | 6.00 | 12.00 | 2.00x | 5.00 (1.20x) | 4.00 (1.50x) |" in steps
    assert "at most 1.15 (float32) and 1.25 (bfloat16)" in steps
    assert "Targets here: missed at float32 B = 64 (1.200 times its GEMMs).\n" in steps
    sample = "| float32 | 32 | 16 | 256 | 32 | 0.50 s | 2.00 s | 4.00x | 0.80 s | 0.40 s (1.25x) |"
    assert sample in tables["edm_samples"]
    assert "| A2C update | batch 1024 | float32 | 266 ms |" in tables["updates"]
    update = "on Hopper-v5, batch 128, engine torch, environment steps 4, denoiser updates 3"
    assert f"{update} | float32 | 5 ms" in tables["updates"]
    offline = tables["offline_updates"]
    assert "| iql | 256 | 5 ms (60%), 200 per s | 8 ms | 4 ms | 1.4 h |" in offline
    assert "| td3_bc | 256 | wrong" in offline and offline.count("not measured |") == 3
    assert "| Hopper-v5 | 10,000 | 12,500 | 20,000 |" in tables["environments"]
    assert tables["quick_seeds"] == "On a CPU: not measured."
    assert tables["kernels"] == "On a CPU: not measured.\n\nOn a GPU: not measured."
    assert tables["updates"].endswith("\n\nOn a GPU: not measured.")
    assert "commit aaaaaaa" in tables["provenance"] and "driver 580" in tables["provenance"]
    assert (
        "- sampler_cpu, edm_samples, samples, updates, offline_updates, environments: `pytest"
        in tables["provenance"]
    )
    assert all("| --- |" not in report.build(name, []) for name in report.TABLES)
    smoke = [dataclasses.replace(row, smoke=True) for row in MEASURED]
    assert all(report.build(n, smoke) == report.build(n, []) for n in report.TABLES)


def test_of_a_gpu_the_best_dtype_of_each_engine_is_shown():
    gpu = {"device": "cuda", "gpu": "NVIDIA H200"}
    rows = [
        sampled("torch", dtype, batch, ms=ms, **gpu)
        for batch, times in ((64, (9.0, 3.0, 4.0, 8.0)), (256, (20.0, 6.0, 5.0, 16.0)),
                             (1024, (90.0, 31.0, 30.0, 80.0)))
        for dtype, ms in zip(("float32", "bfloat16", "float16", "tf32"), times, strict=True)
    ]  # fmt: skip
    table = report.build("samples", rows)
    assert "| denoiser | H | B | torch float16 | torch float32 |" in table
    assert "| residual mlp | 10 | 64 | 4 ms | 9 ms |" in table


def test_kernels_of_the_papers_sizes_only_on_a_gpu():
    def row(benchmark, device="cuda", **case):
        return make_row(benchmark=benchmark, case=case, ms=1.0, device=device, gpu="NVIDIA H200")

    wide = row("residual_mlp layer", rows=4096, width=1024)
    rows = [
        row("residual_mlp layer", rows=1024, width=1024),
        row("guided_step", batch=1024, horizon=10),
        wide,
        row("residual_mlp layer", rows=1024, width=2048),
        row("guided_step", batch=1024, horizon=50),
        row("guided_step", batch=256, horizon=10),
        row("guided_step", device="cpu", batch=64, horizon=10),
    ]
    table = report.build("kernels", rows)
    assert table.count("residual_mlp layer |") == 1 and table.count("guided_step |") == 2
    assert "rows 1024, width 1024" in table and "batch 64, horizon 10" in table


@pytest.mark.parametrize(
    "name, damage",
    [
        ("samples", lambda row: {"case": {"engine": "torch", "denoiser": "residual_mlp"}}),
        ("sampler_cpu", lambda row: {"values": {"packed_ms": 4.0}}),
        ("sampler_cpu", lambda row: {"values": row.values | {"gemms_ms": 0.0}}),
        ("sampler_cpu", lambda row: {"dtype": "float16"}),
        ("edm_samples", lambda row: {"values": {"reference_ms": 4.0}}),
        ("environments", lambda row: {"values": {}}),
        ("environments", lambda row: {"ms": None}),
    ],
)
def test_rows_without_what_a_table_shows_are_one_error(name, damage):
    rows = [row for row in MEASURED if row.benchmark in report.TABLES[name].benchmarks]
    damaged = dataclasses.replace(rows[0], **damage(rows[0]))
    with pytest.raises(InputError, match=f"the table '{name}' cannot be made"):
        report.build(name, [damaged])


def test_machines_do_not_mix():
    """What a GPU machine's processor measured stands in a table of its own."""
    row = make_row(benchmark="environment step", case={"env_id": "Hopper-v5"}, ms=0.05,
                   values={"bare_ms": 0.04}, **XEON | {"threads": 16})  # fmt: skip
    table = report.build("environments", [*MEASURED, row])
    assert "| Hopper-v5 | 10,000 |" in table and "| Hopper-v5 | 20,000 |" in table
    assert "On Xeon, family 6 model 143 with AMX, 16 threads:\n\n| " in table


def test_machines_are_told_apart_by_family_and_model():
    """Processors of one name share nothing else; rows from before say what is missing."""

    def machine(**changes) -> str:
        return dataclasses.replace(MEASURED[0], **EPYC | changes).machine

    assert machine() == "AMD EPYC, family 26 model 2 with AVX-512 BF16, 1 thread"
    assert machine(processor_family=25, processor_model=17).startswith("AMD EPYC, family 25 model")
    assert machine(instruction_sets="avx2") == "AMD EPYC, family 26 model 2 with AVX2, 1 thread"
    assert machine(instruction_sets=None, threads=2) == "AMD EPYC, family 26 model 2, 2 threads"
    unknown = machine(processor_family=None, processor_model=None, instruction_sets=None)
    assert unknown == "AMD EPYC, family not recorded, 1 thread"
    assert machine(processor="Intel(R) Xeon(R) 6").startswith("Intel Xeon 6, family 26")
    assert machine(device="cuda", gpu="NVIDIA H200") == "NVIDIA H200"
    keys = {dataclasses.replace(MEASURED[0], **EPYC | {"processor_model": m}).key for m in (1, 2)}
    assert len(keys) == 2


def test_rows_of_two_machines_stand_side_by_side(tmp_path):
    """Also beside one from before families were recorded, which keeps its line."""
    path = tmp_path / "rows.jsonl"
    old = dataclasses.asdict(dataclasses.replace(MEASURED[1], processor="AMD EPYC"))
    for name in ("vendor", "family", "model"):
        del old[f"processor_{name}"]
    del old["instruction_sets"]
    path.write_text(json.dumps(old) + "\n")
    file = RowFile(path)
    for ms in (500.0, 400.0):
        file.add(dataclasses.replace(MEASURED[1], ms=ms, **XEON))
    file.add(dataclasses.replace(MEASURED[1], ms=300.0, **EPYC))
    rows = read_rows(path)
    assert [row.ms for row in rows] == [640.0, 400.0, 300.0]
    assert [row.processor_family for row in rows] == [None, 6, 26]
    table = report.build("samples", rows)
    places = [table.index(f"On {row.machine}:\n") for row in rows]
    assert places == sorted(places) and "family not recorded" in table


def stepped(dtype, batch, ms, reference, share=0.5, **changes) -> Row:
    case = {"engine": "torch", "batch": batch, "horizon": 10, "steps": 64}
    values = {"gemms_ms": 5.0, "packed_ms": 5.0, "reference_ms": reference}
    changes = {"benchmark": "sampler step", "case": case, "values": values} | changes
    return make_row(dtype=dtype, ms=ms, share_of_floor=share, **changes)


def test_what_is_claimed_holds_on_every_machine():
    """Factors are rounded down, and only batches that all machines measured count."""
    rows = [
        stepped("float32", 64, 4.0, 9.19, 0.699, **EPYC),
        stepped("float32", 256, 4.0, 8.0, 0.75, **EPYC),
        stepped("float32", 1024, 4.0, 4.0, 0.1, **EPYC),
        stepped("float32", 64, 4.0, 4.79, 0.5, **XEON),
        stepped("float32", 256, 4.0, 5.0, 0.6, **XEON),
        stepped("bfloat16", 64, 4.0, 12.0, None, **EPYC),
        stepped("bfloat16", 64, 4.0, 12.0, None, **XEON),
        stepped("bfloat16", 256, 4.0, 8.0, **EPYC),
        stepped("bfloat16", 256, None, 8.0, status="wrong", checks=(), **XEON),
    ]
    table = report.build("claims", rows)
    first, _, float32, bfloat16, *_ = table.splitlines()
    assert first.startswith("| engine torch | on all of these | AMD EPYC, family 26 model 2 with")
    assert float32 == (
        "| float32 | at least 1.1x | 2.0 to 2.2x, 69% to 75% of floor "
        "| 1.1 to 1.2x, 50% to 60% of floor |"
    )
    assert bfloat16 == "| bfloat16 | at least 3.0x | 3.0x | 3.0x |"
    assert "B = 64, 256, S = 17" in table
    alone = report.build("claims", rows[:3])
    assert "| float32 | at least 1.0x | 1.0 to 2.2x, 10% to 75% of floor |" in alone
    assert "| on this machine |" in alone
    apart = report.build("claims", [rows[2], rows[3]])
    assert apart == "On a CPU: not measured."
    assert report.build("claims", []) == "On a CPU: not measured."


def updated(preset, batch, engine, ms, dtype="float32", env_id="Walker2d-v5", **changes) -> Row:
    case = {"preset": preset, "env_id": env_id, "batch": batch, "engine": engine}
    values = {"env_steps": 4, "denoiser_updates": 4}
    return make_row(benchmark="whole update", dtype=dtype, case=case, ms=ms, values=values,
                    **changes)  # fmt: skip


def test_the_table_for_users():
    rows = [
        sampled("reference", batch=256, ms=5000.0, calls=1),
        sampled("torch", batch=256, ms=2500.0),
        sampled("torch", batch=64, ms=600.0),
        sampled("torch", "bfloat16", batch=256, ms=25_000.0, calls=1),
        sampled("torch", batch=4096, ms=1.0),
        sampled("torch", batch=256, horizon=50, ms=1.0),
        updated("default", 64, "torch", 3600.0),
        updated("default", 64, "reference", 4680.0),
        updated("quick", 128, "torch", 36.0, env_id="InvertedPendulum-v5"),
        updated("quick", 8, "torch", 1.0, env_id="InvertedPendulum-v5"),
    ]
    table = report.build("speed", rows)
    lines = table.splitlines()
    machine = rows[0].machine
    assert lines == [
        f"|  | {machine} |",
        "| --- | --- |",
        "| imagining 256 trajectories, float32 | 2.5 s (2.0x)* |",
        "| imagining 256 trajectories, bfloat16 | 25 s (0.2x)* |",
        "| 1 M environment steps, preset default with 64 imagined trajectories an update, float32 "
        "| 250 h (1.3x) |",
        "| 1 M environment steps, preset quick, float32 | 2.5 h |",
        "| its own 5,000 steps | 0.8 minutes |",
        *lines[7:],
    ]
    assert "Walker2d-v5 and InvertedPendulum-v5" in table
    assert table.endswith("On a GPU: not measured.")
    whole = [*rows, updated("default", 1024, "torch", 36_000.0)]
    line = "| 1 M environment steps, preset default, float32 | 2,500 h |"
    assert line in report.build("speed", whole)
    assert "imagined trajectories an update" not in report.build("speed", whole)
    between = report.build("speed", [*rows, updated("default", 512, "torch", 7200.0)])
    assert "with 512 imagined trajectories an update, float32 | 500 h |" in between
    faster = [*whole, updated("default", 1024, "triton", 18_000.0)]
    assert "float32 | 1,250 h |" in report.build("speed", faster)
    elsewhere = dataclasses.replace(rows[1], processor="Another", ms=1000.0)
    both = report.build("speed", [*rows, elsewhere])
    assert "| imagining 256 trajectories, float32 | 2.5 s (2.0x)* | 1 s |" in both
    on_gpu = dataclasses.replace(rows[1], device="cuda", gpu="NVIDIA H200", ms=10.0)
    assert "On a GPU: not measured" not in report.build("speed", [*rows, on_gpu])


def seeded(
    env_id, seed, untrained, best, last, world_model="trajectory_diffusion", **changes
) -> Row:
    values = {
        "untrained_mean_reward": untrained, "best_mean_reward": best, "last_mean_reward": last,
        "untrained_std_reward": 1.0, "best_std_reward": 2.0, "last_std_reward": 30.0,
        "train_steps": 8000, "selection_steps": 96000 + seed, "selection_evaluations": 16,
        "train_seconds": 60.0 * seed, "best_step": 7500, "episodes": 100,
        "evaluation_seed": 2**31 + seed,
    }  # fmt: skip
    case = {"env_id": env_id, "preset": "quick", "world_model": world_model, "seed": seed}
    changes = {"benchmark": "quick_seeds", "case": case, "ms": None, "values": values} | changes
    return make_row(**changes)


def test_what_a_preset_learns():
    rows = [
        seeded("Hopper-v5", 1, 10.0, 300.0, 200.0),
        seeded("Pendulum-v1", 3, -1200.0, -180.0, -230.0),
        seeded("Pendulum-v1", 1, -1400.0, -220.0, -250.0),
        seeded("Pendulum-v1", 1, -1200.0, -170.0, -175.0, "autoregressive"),
        seeded("Pendulum-v1", 1, -1300.0, -900.0, -900.0, "none, PPO"),
        seeded("Hopper-v5", 2, 1.0, 1.0, 1.0, status="error", error="NaN", values={}),
        seeded("Swimmer-v5", 2, 1.0, 1.0, 1.0, status="error", error="NaN", values={}),
    ]
    quick = "quick | trajectory diffusion"
    lines = report.build("quick_seeds", rows).splitlines()
    assert lines[4:9] == [
        f"| Pendulum-v1 | {quick} | yes | 2 | -1300 (-1400 to -1200) | -200 (-220 to -180) "
        "| -240 (-250 to -230) | 8,000 + 96,002 | 2.0 |",
        "| Pendulum-v1 | quick | autoregressive | yes | 1 | -1200 (-1200 to -1200) "
        "| -170 (-170 to -170) | -175 (-175 to -175) | 8,000 + 96,001 | 1.0 |",
        "| Pendulum-v1 | quick | none, PPO | - | 1 | -1300 (-1300 to -1300) "
        "| -900 (-900 to -900) | -900 (-900 to -900) | 8,000 + 96,001 | 1.0 |",
        f"| Hopper-v5 | {quick} | no | 1, 1 failed | 10 (10 to 10) | 300 (300 to 300) "
        "| 200 (200 to 200) | 8,000 + 96,001 | 1.0 |",
        f"| Swimmer-v5 | {quick} | no | 0, 1 failed | - | - | - | - | - |",
    ]
    each = report.build("quick_seeds_each", rows)
    assert (
        f"| Pendulum-v1 | {quick} | 1 | -1400 ± 1.0 | -220 ± 2.0 | -250 ± 30 | 7,500 | 8,000 "
        f"| 96,001 in 16 evaluations | 1.0 | 2147483649 |\n| Pendulum-v1 | {quick} | 3 |" in each
    )
    assert f"| Hopper-v5 | {quick} | 2 | error | - |" in each
    assert "over 100 episodes of the evaluation seed" in each


def test_how_far_actions_are_from_the_policys():
    def row(update, sigma, seed, ks, r2):
        values = {"std": 1.5, "ks": ks, "ks_floor": 0.01, "r2": r2}
        case = {"env_id": "Hopper-v5", "update": update, "sigma": sigma, "seed": seed}
        return make_row(benchmark="on_policy", case=case, ms=None, values=values)

    rows = [
        row("released", 1.0, 0, 0.02, 0.4),
        row("released", 1.0, 1, 0.04, 0.6),
        row("exact", 1.0, 0, 0.01, -0.001),
        row("exact", 0.1, 0, 0.012, 0.0),
    ]
    lines = report.build("on_policy", rows).splitlines()
    assert "| environment | action update | seeds | sigma 1 | sigma 0.1 |" in lines
    assert "| Hopper-v5 | released | 2 | 1.50, 3.0, 0.500 | not measured |" in lines
    assert "| Hopper-v5 | exact | 1 | 1.50, 1.0, -0.001 | 1.50, 1.2, 0.000 |" in lines


def test_where_an_updates_time_goes():
    parts = {"rest": 1.0, "replay": 0.25, "model_update": 4.0, "imagine": 8.0, "policy_update": 2.0}
    values = {f"{name}_ms": ms for name, ms in parts.items()} | {
        "whole_ms": 15.25, "env_steps": 2, "rounds": 9, "hours_per_million_steps": 2.118,
    }  # fmt: skip
    rows = [
        make_row(
            benchmark="attribution",
            ms=None,
            case={
                "preset": "quick",
                "env_id": "Pendulum-v1",
                "world_model": "trajectory_diffusion",
                "batch": 8,
                "variant": variant,
            },
            values=values | {"times_as_fast": times},
        )
        for variant, times in (("commit 690a659", 1.0), ("+ bfloat16", 1.976))
    ]
    lines = report.build("attribution", rows).splitlines()
    name = "quick, trajectory diffusion, Pendulum-v1"
    assert (
        f"| {name} | commit 690a659 | 15.2 (1.00x) | 4.0 | 8.0 | 2.0 | 0.2 | 1.0 | 2.1 h |" in lines
    )
    assert f"| {name} | + bfloat16 | 15.2 (1.98x) | 4.0 | 8.0 | 2.0 | 0.2 | 1.0 | 2.1 h |" in lines


def test_learning_curves_of_two_commits():
    def row(code, seed, returns):
        return make_row(
            benchmark="learning_curves",
            ms=None,
            case={"env_id": "Pendulum-v1", "preset": "quick", "seed": seed, "code": code},
            values={"train_steps": 500, "processor_seconds": 60.0},
            curves={"env_step": [0, 500], "mean_reward": returns},
        )

    rows = [row("commit a", seed, [-1500.0, -200.0]) for seed in (1, 2)]
    rows += [row("this code", seed, [-1500.0, -190.0 - seed]) for seed in (1, 2)]
    lines = report.build("learning_curves", rows).splitlines()
    header = "Pendulum-v1, quick: environment steps | commit a, 2 seeds | this code, 2 seeds"
    assert f"| {header} | overlap |" in lines
    same = "-1500 (-1500 to -1500)"
    assert f"| 0 | {same} | {same} | yes |" in lines
    assert "| 500 | -200 (-200 to -200) | -192 (-192 to -191) | no |" in lines
    assert "Processor seconds of a run, evaluations included: commit a 60, this code 60." in lines


def test_how_true_each_gradient_is():
    values = {
        "updates": 1234, "train_seconds": 60.0, "seconds_per_1000": 0.256,
        "newest/cosine": 0.91, "newest/ceiling": 0.95, "newest_lambda_0/cosine": 0.97,
        "newest_lambda_0/ceiling": 0.99, "all/cosine": -0.2, "all/ceiling": 0.9,
        "on_policy/r2": 0.0004, "on_policy/std": 1.001, "on_policy/ks": 0.0031,
        "on_policy/ks_floor": 0.0042, "error/rms": 0.0312, "error/missed_terminals": 0.0052,
    }  # fmt: skip
    rows = [
        make_row(
            benchmark="world_models",
            case={"env_id": env_id, "env_steps": 70_000, "world_model": name, "steps": steps},
            ms=None,
            values=values,
        )
        for env_id, name, steps in (("Hopper-v5", "rollout", 8), ("Hopper-v5", "one-step", 0))
    ]
    table = report.build("world_models", rows)
    assert "Hopper-v5, run at 70,000 steps:" in table
    assert (
        "| rollout | 8 | 1,234 | 0.91 (0.95) | 0.97 (0.99) | -0.20 (0.90) | 0.000 | 1.00 "
        "| 0.003 (0.004) | 0.031 | 0.52% | - | 0.26 |" in table
    )
    assert "| one-step | - | 1,234 |" in table and "trained 60 processor seconds" in table
    values |= {"critic/value": 36.16, "critic/discounted_return": 31.72}
    rows = [dataclasses.replace(row, values=values) for row in rows]
    critic = "its critic's values 36.2, returns 31.7"
    assert f"run at 70,000 steps; {critic}:" in report.build("world_models", rows)
    rows = [dataclasses.replace(row, values=values | {"critic/correlation": 0.36}) for row in rows]
    assert f"{critic}, correlation 0.36:" in report.build("world_models", rows)
    imagined = [values | {"critic/imagined_return": mean} for mean in (33.33, 40.0)]
    rows = [dataclasses.replace(row, values=v) for row, v in zip(rows, imagined, strict=True)]
    table = report.build("world_models", rows)
    assert "| 0.52% | 33.3 | 0.26 |" in table and "| 0.52% | 40.0 | 0.26 |" in table


def test_listing():
    lines = report.listing(MEASURED).splitlines()
    assert len(lines) == 1 + len(MEASURED) and lines[0].startswith("case")
    assert "2.00" in lines[2] and lines[2].endswith("ok")  # against the reference
    assert lines[6].endswith("wrong, one step: 2.0e-02 > 1.0e-02") and "checks" not in lines[0]


README = "before\n<!-- table: updates -->\nold\n<!-- end of table -->\nafter\n"


def test_rendering():
    new = report.render(README, MEASURED)
    assert new.startswith("before\n<!-- table: updates -->\nOn ") and "\n| what " in new
    assert new.endswith("\n<!-- end of table -->\nafter\n") and "\nold\n" not in new
    assert report.render(new, MEASURED) == new
    assert report.stale_tables(README, MEASURED) == ["updates"]
    assert report.stale_tables(new, MEASURED) == []


@pytest.mark.parametrize(
    "text, message",
    [
        ("no tables", "0 tables begin"),
        (README.replace("updates", "wings"), "'wings' is not one of"),
        (README.replace("<!-- end of table -->", ""), "0 of them end"),
        (README + README.replace("<!-- end of table -->", ""), "2 tables begin .* 1 of them"),
    ],
)
def test_wrong_markers(text, message):
    with pytest.raises(InputError, match=message):
        report.render(text, MEASURED)


@pytest.fixture
def results(tmp_path):
    write_rows(tmp_path / "results" / "rows.jsonl", MEASURED)
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def bench_report(folder, *options: str) -> int:
    words = ["--results", str(folder / "results"), *options]
    return script.main([word.format(folder) for word in words])


def test_the_command_line_prints_writes_and_checks(results, capsys):
    assert bench_report(results) == 0
    assert "| A2C update |" in capsys.readouterr().out
    assert bench_report(results, "--readme", "{}/README.md", "--check") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "updates differ from the rows" in error
    assert (results / "README.md").read_text() == README
    assert bench_report(results, "--readme", "{}/README.md") == 0
    assert "1 tables changed" in capsys.readouterr().out
    assert bench_report(results, "--readme", "{}/README.md", "--check") == 0


def test_several_files_are_written_and_checked(results, capsys):
    """One that cannot be written keeps the others from being written."""
    for name, text in (("other.md", README), ("plain.md", "no tables")):
        (results / name).write_text(text)
    both = "--readme", "{}/README.md", "{}/other.md"
    assert bench_report(results, *both, "{}/plain.md") == 2
    assert (results / "README.md").read_text() == README
    assert bench_report(results, *both) == 0
    assert capsys.readouterr().out.count("1 tables changed") == 2
    assert bench_report(results, *both, "--check") == 0
    (results / "other.md").write_text(README)
    assert bench_report(results, *both, "--check") == 2
    assert "other.md: updates differ" in capsys.readouterr().err
    assert (results / "other.md").read_text() == README


@pytest.mark.parametrize(
    "options, message",
    [
        (["--check"], "--check needs --readme or --plots"),
        (["--plots", "{}/README.md"], "README.md is a file, wanted a folder"),
        (["--plots", "{}/none", "--check"], "batch.png, figure_4.png missing or not of the rows"),
        (["--results", "{}/empty"], "rows.jsonl is empty"),
        (["--results", "{}/lacking"], "the table 'speed' cannot be made"),
        (["--results", "{}/lacking", "--plots", "{}/p"], "the plots cannot be made"),
        (["--readme", "{}/none.md"], "cannot read"),
        (["--readme", "{}/plain.md"], "plain.md: 0 tables begin"),
        (["--results", "{}/none"], "holds no rows"),
        (["--results", "{}/damaged"], "rows.jsonl, line 1"),
        (["--wings", "2"], "--wings"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(results, capsys, options, message):
    (results / "plain.md").write_text("no tables")
    for folder, text in (("damaged", "{}\n"), ("empty", "")):
        (results / folder).mkdir()
        (results / folder / "rows.jsonl").write_text(text)
    write_rows(results / "lacking" / "rows.jsonl", [sampled(case={"batch": "x"}), sampled()])
    assert bench_report(results, *options) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and message in captured.err and captured.out == ""


def test_plots(results, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    assert bench_report(results, "--plots", "{}/plots") == 0
    names = {path.name for path in (results / "plots").iterdir()}
    assert names == {"batch.png", "figure_4.png"}
    for path in (results / "plots").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 100_000
    drawn = {path: path.stat().st_mtime_ns for path in (results / "plots").iterdir()}
    assert bench_report(results, "--plots", "{}/plots", "--check") == 0
    other = [dataclasses.replace(MEASURED[0], ms=1279.0), *MEASURED[1:]]
    assert figures.stale_plots(other, results / "plots") == ["batch.png", "figure_4.png"]
    assert figures.stale_plots(MEASURED, results) == ["batch.png", "figure_4.png"]
    write_rows(results / "results" / "rows.jsonl", other)
    assert bench_report(results, "--plots", "{}/plots", "--check") == 2
    assert drawn == {path: path.stat().st_mtime_ns for path in (results / "plots").iterdir()}
    with pytest.raises(InputError, match="no row holds the time of a whole sample"):
        figures.draw_all([MEASURED[7]], results)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    capsys.readouterr()
    assert bench_report(results, "--plots", "{}/plots") == 2
    assert "polygrad-fast[plots]" in capsys.readouterr().err


def test_what_is_learned_is_drawn(tmp_path, monkeypatch):
    figure_class = pytest.importorskip("matplotlib.figure").Figure
    drawn = []
    monkeypatch.setattr(figure_class, "savefig", lambda self, *a, **k: drawn.append(self))
    curves = {
        1: {"env_step": [0, 500, 1000], "mean_reward": [1.0, 5.0, 9.0]},
        2: {"env_step": [0, 500], "mean_reward": [3.0, 6.0]},
    }
    rows = [
        *(seeded("Hopper-v5", seed, 1.0, 1.0, 1.0, curves=curve) for seed, curve in curves.items()),
        seeded("Hopper-v5", 3, 1.0, 1.0, 1.0, curves=curves[1], smoke=True),
        seeded("Hopper-v5", 1, 1.0, 1.0, 1.0, "autoregressive", curves=curves[2]),
    ]
    names = [path.name for path in figures.draw_all(MEASURED + rows, tmp_path)]
    assert names == ["learning.png", "batch.png", "figure_4.png"]
    (axes,) = drawn[0].axes
    assert axes.get_title() == "Hopper-v5, quick"
    words = [text.get_text() for text in axes.get_legend().get_texts()]
    assert words == ["trajectory diffusion, 2 seeds", "autoregressive"]
    first, second, mean, other, other_mean = axes.lines
    assert list(other.get_ydata()) == [3.0, 6.0] == list(other_mean.get_ydata())
    assert list(first.get_ydata()) == [1.0, 5.0, 9.0] and list(second.get_ydata()) == [3.0, 6.0]
    assert list(mean.get_xdata()) == [0, 500, 1000] and list(mean.get_ydata()) == [2.0, 5.5, 9.0]
    for wrong in ({"a": [float("nan")]}, {"a": ["x"]}, {"a": [1.0], "b": [1.0, 2.0]}):
        with pytest.raises(InputError, match="curve"):
            seeded("Hopper-v5", 1, 1.0, 1.0, 1.0, curves=wrong)


def test_what_is_drawn(tmp_path, monkeypatch):
    figure_class = pytest.importorskip("matplotlib.figure").Figure
    drawn = []
    monkeypatch.setattr(figure_class, "savefig", lambda self, *a, **k: drawn.append(self))
    figures.draw_all(MEASURED, tmp_path)
    lines = {line.get_label(): line for line in drawn[1].axes[0].lines}
    line = lines["residual MLP, torch float32, B = 64"]
    assert list(line.get_xdata()) == [10, 50] and list(line.get_ydata()) == [10.0, 100.0]
    assert "seconds per 1000 trajectories" in drawn[1].axes[0].get_ylabel()
    for axes in drawn[0].axes + drawn[1].axes:
        low, high = axes.get_ylim()
        ticks = [y for y in axes.yaxis.get_major_locator().tick_values(low, high) if low < y < high]
        assert len(ticks) >= 2
    titles = [axes.get_title().replace("\n", " ") for axes in drawn[0].axes]
    assert titles == [MEASURED[0].machine, "NVIDIA H200"]
    widths = [len(line) for axes in drawn[0].axes for line in axes.get_title().splitlines()]
    assert max(widths) <= 60
