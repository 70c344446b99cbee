"""Which processor a machine has, from texts of /proc/cpuinfo."""

import dataclasses

import pytest

from polygrad_fast.runs import processor
from polygrad_fast.runs.processor import Processor

EPYC = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC
flags\t\t: fpu avx avx2 avx512f avx512_bf16_not avx512_bf16

processor\t: 1
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 1
flags\t\t: amx_bf16
"""


def test_a_processor_is_read():
    found = Processor.from_cpuinfo(EPYC)
    assert found == Processor("AMD EPYC", "AuthenticAMD", 25, 17, "avx2 avx512f avx512_bf16")


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("", Processor()),
        ("processor\t: 0\nCPU part\t: 0xd40\n", Processor()),
        ("model name: Xeon\ncpu family: x\nflags: fpu\n", Processor("Xeon", instruction_sets="")),
    ],
)
def test_what_is_unknown_is_none(text, wanted):
    assert Processor.from_cpuinfo(text) == wanted


def test_without_cpuinfo_only_a_name_is_known(monkeypatch):
    def fail(*arguments):
        raise OSError

    monkeypatch.setattr(processor.Path, "read_text", fail)
    monkeypatch.setattr(processor.platform, "processor", lambda: "arm")
    assert Processor.of_this_machine() == Processor("arm")
    monkeypatch.setattr(processor.platform, "processor", lambda: "")
    monkeypatch.setattr(processor.platform, "machine", lambda: "")
    assert set(dataclasses.asdict(Processor.of_this_machine()).values()) == {None}
