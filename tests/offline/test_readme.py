"""What the README of offline learning says is what works."""

import os
import re
import shlex
from pathlib import Path

from polygrad_fast import cli
from polygrad_fast.config import offline as presets

README = Path(__file__).resolve().parents[2] / "polygrad_fast" / "offline" / "README.md"


def test_the_code_and_the_commands_run(
    tmp_path, monkeypatch, capsys, tiny_diffuse, tiny_train, tiny_dynamics
):
    """The data in Python, the commands, and the same in Python, with tiny sizes."""
    monkeypatch.setitem(presets.DIFFUSE_PRESETS, "quick", lambda: tiny_diffuse)
    monkeypatch.setitem(presets.OFFLINE_TRAIN_PRESETS, "quick", lambda: tiny_train)
    monkeypatch.setitem(presets.DYNAMICS_PRESETS, "quick", lambda: tiny_dynamics)
    monkeypatch.chdir(tmp_path)
    text = README.read_text()
    data, python = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    _, shell, baseline, _ = re.findall(r"```\n(polygrad-fast.*?)```", text, re.DOTALL)
    names: dict = {}
    exec(compile(data, "README.md", "exec"), names)
    commands = (baseline + shell).replace("\\\n", " ").splitlines()
    assert len(commands) == 5
    for command in commands:
        assert cli.main(shlex.split(command, comments=True)[1:]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.splitlines()[-1].startswith('{"mean_reward": ')
    os.rename("runs", "first")
    exec(compile(python, "README.md", "exec"), names)
    assert abs(float(capsys.readouterr().out.splitlines()[-1].strip("[] "))) <= 2


def test_presets_are_all_named():
    named = re.findall(r"^\| `(\w+)` \|", README.read_text(), re.MULTILINE)
    assert set(named) == set(presets.DIFFUSE_PRESETS) == set(presets.OFFLINE_TRAIN_PRESETS)
