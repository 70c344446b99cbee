import errno
import importlib.metadata
import json
import math
import os
import pathlib
import struct
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import polygrad_fast
from polygrad_fast.errors import InputError
from polygrad_fast.runs.files import write_json_atomic
from polygrad_fast.runs.metrics import MetricsLog, TensorboardLog, read_metrics
from polygrad_fast.runs.versions import versions


def bits(value: float) -> bytes:
    return struct.pack("<d", value)


def test_rows_and_text(tmp_path):
    with MetricsLog(tmp_path / "run" / "metrics.csv") as log:
        log.write(10, {"train/loss": 0.1, "train/episodes": 3})
        log.write(20, {"train/episodes": torch.tensor(4)})
        assert log.path.read_text() == (
            "env_step,train/loss,train/episodes\n10,0.1,3.0\n20,,4.0\n"  # before close()
        )
        assert log.rows == [
            {"env_step": 10, "train/loss": 0.1, "train/episodes": 3.0},
            {"env_step": 20, "train/episodes": 4.0},
        ]
    assert os.listdir(tmp_path / "run") == ["metrics.csv"]


def test_columns_may_appear_later(tmp_path):
    with MetricsLog(tmp_path / "metrics.csv") as log:
        log.write(1, {"a": 1.0})
        log.write(2, {"b, with comma": 2.0, "a": 3.0})
        log.write(3, {"b, with comma": 4.0})
    assert log.path.read_text() == 'env_step,a,"b, with comma"\n1,1.0,\n2,3.0,2.0\n3,,4.0\n'


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(), min_size=1, max_size=8))
def test_floats_come_back_exactly(tmp_path_factory, values):
    with MetricsLog(tmp_path_factory.mktemp("log") / "metrics.csv") as log:
        for step, value in enumerate(values):
            log.write(step, {"x": value})
        for row, value in zip(log.rows, values, strict=True):
            if math.isnan(value):
                assert math.isnan(row["x"])
            else:
                assert bits(row["x"]) == bits(value)


def test_resume_drops_later_and_half_written_rows(tmp_path):
    path = tmp_path / "metrics.csv"
    whole = "env_step,a,b\n1,0.1,\n2,0.2,5.0\n3,0.3,6.0\n"
    for tail in ("", "4", "4,0.4", "4,0.4,7.", "4,0.4\n", "4,0.4,\0\0\n", "\0\0\0", "x,1.0,2.0\n"):
        path.write_text(whole + tail)
        with MetricsLog(path, resume_step=2) as log:
            assert [row["env_step"] for row in log.rows] == [1, 2], repr(tail)
            assert path.read_text() == "env_step,a,b\n1,0.1,\n2,0.2,5.0\n"
            log.write(3, {"b": 1.5})
        assert path.read_text().endswith("2,0.2,5.0\n3,,1.5\n")


def test_resume_without_a_log_starts_one(tmp_path):
    with MetricsLog(tmp_path / "metrics.csv", resume_step=5) as log:
        log.write(6, {"a": 1.0})
        assert len(log.rows) == 1
    (tmp_path / "metrics.csv").write_text("env_s")
    with MetricsLog(tmp_path / "metrics.csv", resume_step=5) as log:
        assert log.rows == []


def test_a_new_log_does_not_overwrite_an_old_one(tmp_path):
    path = tmp_path / "metrics.csv"
    with MetricsLog(path) as log:
        log.write(1, {"a": 1.0})
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"metrics.csv holds 1 rows already"):
        MetricsLog(path)
    assert path.read_bytes() == before


def test_logs_of_updates(tmp_path):
    path = tmp_path / "metrics.csv"
    with MetricsLog(path, step_column="update") as log:
        log.write(3, {"loss": 0.5})
        log.write(4, {"loss": 0.25, "env_step": 7})
    assert path.read_text().splitlines()[0] == "update,loss,env_step"
    assert read_metrics(path) == [
        {"update": 3, "loss": 0.5},
        {"update": 4, "loss": 0.25, "env_step": 7.0},
    ]
    with MetricsLog(path, 3, "update") as log:
        assert log.rows == [{"update": 3, "loss": 0.5}]
        with pytest.raises(ValueError, match="name other than 'update', got 'update'"):
            log.write(5, {"update": 1.0})
    with pytest.raises(InputError, match="with 'env_step' as its first column, got 'update'"):
        MetricsLog(path, 3)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "prices.csv").write_text("day,price\n1,2\n")
    with pytest.raises(
        InputError, match="prices.csv must be a metrics log, .*'update'\\], got 'day'"
    ):
        MetricsLog(tmp_path / "prices.csv", resume_step=1)
    with pytest.raises(InputError, match=r"none.csv cannot be read .*: No such file"):
        read_metrics(tmp_path / "none.csv")


@pytest.mark.parametrize("name", ["env_step", "", "two\nlines"])
def test_bad_metric_names_write_nothing(tmp_path, name):
    with MetricsLog(tmp_path / "metrics.csv") as log:
        with pytest.raises(
            ValueError, match="metric must have a printable name other than 'env_step', got"
        ):
            log.write(1, {"a": 1.0, name: 2.0})
        assert log.path.read_text() == "env_step\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a file size limit")
def test_a_full_disk_leaves_whole_rows(tmp_path):
    """A limit on the file size stands for the full disk: the write is cut short or refused."""
    script = f"""
import resource, signal
from polygrad_fast.runs.metrics import MetricsLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = MetricsLog({str(tmp_path / "metrics.csv")!r})
log.write(1, {{"a": 0.125}})
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for room in (24, 30, 21):
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    for step, metrics in ((2, {{"a": 1 / 3}}), (2, {{"b": 1 / 3}})):
        try:
            log.write(step, metrics)
        except OSError:
            continue
        raise SystemExit("the write should have failed")
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
log.write(3, {{"a": 0.25}})
"""
    root = os.path.dirname(os.path.dirname(polygrad_fast.__file__))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    }
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
    assert (tmp_path / "metrics.csv").read_text() == "env_step,a\n1,0.125\n3,0.25\n"
    assert os.listdir(tmp_path) == ["metrics.csv"]


def test_an_error_of_the_disk_names_the_users_file(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device", "a", None, "b")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError) as caught:
        write_json_atomic(tmp_path / "config.json", {})
    wanted = f"[Errno {errno.ENOSPC}] No space left on device: {str(tmp_path / 'config.json')!r}"
    assert str(caught.value) == wanted
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file'$"):
        write_json_atomic(tmp_path / "file" / "config.json", {})


def test_json_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    write_json_atomic(path, {"a": [1, None]})
    assert json.loads(path.read_text()) == {"a": [1, None]}
    with pytest.raises(TypeError):
        write_json_atomic(path, {"a": object()})

    def fail(descriptor):
        raise OSError("disk failed")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk failed"):
        write_json_atomic(path, {"b": 2})
    assert json.loads(path.read_text()) == {"a": [1, None]}
    assert os.listdir(tmp_path) == ["config.json"]


def test_versions():
    found = versions()
    assert found["python"] == sys.version.split()[0]
    assert found["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    for name in ("polygrad_fast", "numpy", "gymnasium", "platform", "processor"):
        assert found[name], name
    assert set(found) >= {"mujoco", "triton", "git_commit", "cuda", "gpu"}
    json.dumps(found)


def test_versions_never_fail(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("nothing works")

    monkeypatch.setattr(subprocess, "run", fail)
    monkeypatch.setattr(importlib.metadata, "version", fail)
    monkeypatch.setattr(pathlib.Path, "read_text", fail)
    monkeypatch.setattr(torch.cuda, "is_available", fail)
    found = versions()
    assert found["git_commit"] is None and found["torch"] is None and found["gpu"] is None


def test_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with TensorboardLog(tmp_path) as log:
        for step in (1, 2, 3):
            log.write(step, {"eval/mean_reward": 10.0 * step})
    with TensorboardLog(tmp_path, resume_step=2) as log:
        log.write(4, {"eval/mean_reward": 40.0})
    events = accumulator.EventAccumulator(str(tmp_path)).Reload().Scalars("eval/mean_reward")
    assert [(event.step, event.value) for event in events] == [(1, 10.0), (2, 20.0), (4, 40.0)]


def test_missing_tensorboard_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(InputError, match=r"polygrad-fast\[tensorboard\]"):
        TensorboardLog(tmp_path)
