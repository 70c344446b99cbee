"""Ranges: listed in the page, nested, closed after errors, seen by NVTX tools and torch.profiler,
absent where nothing records."""

import gzip
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import polygrad_fast as pg
from cases import tiny_config
from polygrad_fast import profiling
from polygrad_fast.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "benchmarks" / "PROFILING.md"
ON_GRAPHS = {"graph_capture", "graph_inputs", "graph_replay", "graph_outputs"}
NESTED = {  # a range and those directly around it; None: it can be outermost
    "a2c_update": {"policy_update"},
    "act": {None},
    "check_finite": {"model_update", "policy_update", None},  # before a row or a checkpoint
    "check_inputs": {"sample"},
    "checkpoint": {None},
    "denoiser": {"sample"},
    "model_update": {None},
    "diffusion_step": {"sample"},
    "env_reset": {None},
    "env_step": {None},
    "evaluation": {None},
    "guidance_update": {"policy_update"},
    "guided_step": {"sample"},
    "imagine": {"policy_update"},
    "line_search": {"a2c_update"},
    "line_search_trial": {"line_search"},
    "noise": {"sample"},
    "normalizer_update": {None},
    "policy_update": {None},
    "refresh": {"sample"},
    "replay_add": {None},
    "replay_sample": {"model_update", "imagine"},
    "results": {"sample"},
    "sample": {"imagine"},
}


class RecordingDomain:
    """Stands for `nvtx.Domain`: records each range with the one around it."""

    def __init__(self):
        self.open: list[str] = []
        self.seen: list[tuple[str, str | None]] = []

    def get_event_attributes(self, message):
        return message

    def push_range(self, attributes):
        self.seen.append((attributes, self.open[-1] if self.open else None))
        self.open.append(attributes)

    def pop_range(self):
        self.open.pop()

    def names(self) -> set[str]:
        return {name for name, _ in self.seen}


@pytest.fixture
def domain(monkeypatch):
    recording = RecordingDomain()
    monkeypatch.setattr(profiling, "_domain", recording)
    return recording


def make_sampler(engine="torch", device="cpu", **config):
    denoiser = pg.ResidualMLPDenoiser(3, 2, 4, hidden_dim=8, num_layers=1)
    return pg.PolicyGuidedSampler(
        denoiser.to(device),
        pg.GaussianPolicy(3, 2, hidden_dim=8).to(device),
        pg.NoiseSchedule.cosine(num_train_timesteps=5),
        pg.Normalizer(3, 2).to(device),
        pg.SamplerConfig.official(**config),
        engine=engine,
    )


def small_config(**overrides) -> pg.TrainConfig:
    options = {
        "denoiser__pretrain_updates": 2,
        "normalizer__refresh": "episode",
        "learning_starts": 195,  # Pendulum's first episode ends at 200
        "eval_interval": 500,
        "eval_episodes": 1,
        "log_interval": 1000,
        "checkpoint_interval": 500,
    }
    return tiny_config(**(options | overrides))


def test_training_emits_nested_and_closed_ranges(domain, tmp_path):
    agent = pg.PolyGRAD("Pendulum-v1", config=small_config(), run_dir=tmp_path / "run")
    agent.learn(205)
    assert domain.open == []
    assert domain.names() == NESTED.keys() - {"diffusion_step"}
    for name, around in domain.seen:
        assert around in NESTED[name], name
    count = [name for name, _ in domain.seen].count
    assert count("env_step") == count("act") == count("replay_add") == 205
    assert count("model_update") == 2 + 10 * 0.5
    assert count("policy_update") == count("sample") == count("a2c_update") == 5
    assert count("denoiser") == count("guided_step") == 5 * 3
    assert count("line_search_trial") >= 5
    assert count("evaluation") == 2


def test_reference_engine_emits_ranges(domain):
    make_sampler("reference").sample(torch.randn(2, 3))
    assert domain.names() == {"sample", "check_inputs", "noise", "diffusion_step", "results"}
    assert domain.open == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("engine", ["torch", "triton"])
def test_a_replayed_graph_is_one_range(engine, domain):
    sampler = make_sampler(engine, "cuda")
    sampler.sample(torch.randn(2, 3, device="cuda"))
    assert "graph_capture" in domain.names()
    domain.seen.clear()
    sampler.sample(torch.randn(2, 3, device="cuda"))
    wanted = {"sample", "check_inputs", "noise", "results"} | ON_GRAPHS - {"graph_capture"}
    assert domain.names() - {"refresh"} == wanted
    assert domain.open == []


def test_ranges_are_closed_after_an_error(domain, monkeypatch):
    sampler = make_sampler()

    def broken(*arguments):
        raise RuntimeError("broken")

    with pytest.raises(InputError):
        sampler.sample(torch.randn(2, 4))
    assert domain.open == [] and ("check_inputs", "sample") in domain.seen
    monkeypatch.setattr(type(sampler._engine.step), "__call__", broken)
    with pytest.raises(RuntimeError, match="broken"):
        sampler.sample(torch.randn(2, 3))
    assert domain.open == [] and domain.seen[-1] == ("guided_step", "sample")


def test_page_lists_the_ranges_of_the_code():
    files = [*(ROOT / "polygrad_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    files = [path for path in files if path.name != "profiling.py"]
    in_code = {n for path in files for n in re.findall(r'annotate\("(\w+)"\)', path.read_text())}
    table = PAGE.read_text().partition("<!-- ranges -->")[2].partition("<!-- end -->")[0]
    in_page = re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)
    assert len(in_page) == len(set(in_page))
    assert set(in_page) == in_code | {"capture"}
    assert in_code == NESTED.keys() | ON_GRAPHS


def test_nothing_is_emitted_when_nothing_records(monkeypatch):
    monkeypatch.setattr(profiling, "_domain", None)
    monkeypatch.setattr(torch.profiler, "record_function", None)
    make_sampler().sample(torch.randn(2, 3))
    assert profiling.annotate("a") is profiling.annotate("b")
    with pytest.raises(ZeroDivisionError), profiling.annotate("a"):
        raise ZeroDivisionError


def test_without_a_usable_nvtx_there_is_no_domain(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvtx", None)  # as if not installed
    assert profiling._recorded_domain() is None
    monkeypatch.setitem(
        sys.modules, "nvtx", types.ModuleType("nvtx")
    )  # as 0.2.10, without get_domain
    assert profiling._recorded_domain() is None


TOOL = r"""
/* An NVTX tool that writes down what it is told; layouts as in nvToolsExt.h and nvtxTypes.h. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct {
    uint16_t version, size;
    uint32_t category;
    int32_t color_type;
    uint32_t color;
    int32_t payload_type, reserved;
    uint64_t payload;
    int32_t message_type;
    const char *message;
} attributes_t;
typedef struct {
    size_t size;
    int (*get_functions)(int module, void ****functions, unsigned *size);
} callbacks_t;

static FILE *out;
static void *domain_create(const char *name) { return (void *)name; }
static void *register_string(void *domain, const char *text) { return (void *)text; }
static int push(void *domain, const attributes_t *event) {
    const char *kind = event->message_type == 3 ? "registered" : "unregistered";
    fprintf(out, "push %s@%s %s\n", event->message, (char *)domain, kind);
    return 0;
}
static int pop(void *domain) {
    fprintf(out, "pop @%s\n", (char *)domain);
    return 0;
}
int InitializeInjectionNvtx2(const void *(*export_table)(uint32_t)) {
    const callbacks_t *callbacks = export_table(1);
    void ***functions;
    unsigned size;
    out = fopen(getenv("NVTX_LOG"), "w");
    setvbuf(out, NULL, _IOLBF, 0);
    if (!callbacks || !callbacks->get_functions(5, &functions, &size)) return 0;
    *functions[4] = push;
    *functions[5] = pop;
    *functions[10] = register_string;
    *functions[12] = domain_create;
    return 1;
}
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="builds a Linux NVTX tool")
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_an_nvtx_tool_receives_registered_names_in_the_own_domain(tmp_path):
    pytest.importorskip("nvtx")
    source, library, log = (tmp_path / name for name in ("tool.c", "tool.so", "log"))
    source.write_text(TOOL)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    program = (
        "from polygrad_fast.profiling import annotate\n"
        "with annotate('outer'):\n"
        "    try:\n"
        "        with annotate('inner'): 1 / 0\n"
        "    except ZeroDivisionError: pass\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "NVTX_INJECTION64_PATH": str(library),
        "NVTX_LOG": str(log),
    }
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    assert log.read_text().splitlines() == [
        "push outer@polygrad_fast registered",
        "push inner@polygrad_fast registered",
        "pop @polygrad_fast",
        "pop @polygrad_fast",
    ]


def names_in(path: Path) -> list[str]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    events = json.loads(data)["traceEvents"]
    prefix = f"{profiling.DOMAIN}::"
    return [e["name"].removeprefix(prefix) for e in events if e["name"].startswith(prefix)]


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_ranges_in_a_chrome_trace(tmp_path, name):
    sampler = make_sampler()
    with profiling.capture(torch_profiler=True) as profiler:
        for _ in range(2):
            sampler.sample(torch.randn(2, 3))
    profiling.write_trace(profiler, tmp_path / name)
    assert os.listdir(tmp_path) == [name]
    names = names_in(tmp_path / name)
    wanted = {"capture", "sample", "check_inputs", "refresh", "noise", "denoiser", "guided_step"}
    assert set(names) == wanted | {"results"}
    assert names.count("sample") == 2 and names.count("denoiser") == 2 * 5


def test_a_trace_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    with profiling.capture(torch_profiler=True) as profiler:
        pass
    with pytest.raises(InputError, match="trace must be a file, got the directory"):
        profiling.write_trace(profiler, tmp_path)
    with pytest.raises(
        InputError, match="trace must be in an existing directory, got .*trace.json"
    ):
        profiling.write_trace(profiler, tmp_path / "nowhere" / "trace.json")
    with pytest.raises(InputError, match="cannot be written: .*too long"):
        profiling.check_trace_path(tmp_path / ("x" * 252))

    def full(path):
        Path(path).write_text("{")
        raise OSError("no space left")

    monkeypatch.setattr(profiler, "export_chrome_trace", full)
    (tmp_path / "trace.json").write_text("older")
    with pytest.raises(OSError, match="no space left"):
        profiling.write_trace(profiler, tmp_path / "trace.json")
    assert os.listdir(tmp_path) == ["trace.json"]
    assert (tmp_path / "trace.json").read_text() == "older"


def test_range_table_is_a_tree():
    with profiling.capture(torch_profiler=True) as profiler:
        for _ in range(3):
            with profiling.annotate("outer"), profiling.annotate("inner"):
                torch.ones(2) + 1
        with profiling.annotate("inner"):
            pass
    lines = profiling.range_table(profiler).splitlines()[1:]
    assert [line[:32].rstrip() for line in lines] == ["capture", "  outer", "    inner", "  inner"]
    assert [int(line[32:40]) for line in lines] == [1, 3, 3, 1]
    assert lines[0].endswith("100.0%")


def test_capture_without_torch_profiler(domain):
    with profiling.capture() as profiler:
        assert profiler is None and domain.open == ["capture"]
    assert domain.open == []


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SMALL = {
    "profile_sampler": "--engine torch --batch 3 --horizon 3 --num-steps 4 --hidden-dim 8 "
    "--policy-dim 8 --warmup 1 --samples 2",
    "profile_update": "--env-id Pendulum-v1 --preset quick --batch 4 --prefill 40 --warmup 1 "
    "--updates 2",
}


@pytest.mark.parametrize("script", SMALL)
def test_scripts_write_a_trace_without_warm_up(script, tmp_path, capsys):
    trace = tmp_path / "trace.json"
    arguments = [*SMALL[script].split(), "--torch-profiler", str(trace), "--device", "cpu"]
    threads = torch.get_num_threads()
    try:
        assert load_script(script).main([*arguments, "--kernel-times"]) == 0
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert "ms per" in out and "\ncapture " in out and "aten::" in out
    names = names_in(trace)
    assert names.count("capture") == 1 and names.count("sample") == 2
    if script == "profile_update":
        for name in ("policy_update", "a2c_update", "line_search", "imagine"):
            assert names.count(name) == 2
        assert names.count("env_step") == 4


@pytest.mark.parametrize("script", SMALL)
@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--batch 0", "--batch must be at least 1, got 0"),
        ("--warmup -1", "--warmup must be at least 0, got -1"),
        ("--device nonsense", "device 'nonsense' cannot be used"),
        (
            "--torch-profiler /nowhere/trace.json",
            "must be in an existing directory, got /nowhere/trace.json",
        ),
        ("--engine reference --dtype float16", "float32"),
        ("--unknown", "--unknown"),
    ],
)
def test_scripts_refuse_bad_input_in_one_line(script, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        load_script(script).main([*SMALL[script].split(), *arguments.split()])
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""
