"""The compile gate over every kernel and target, and over kernels with a planted fault each."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
REASONS = {
    "sound": None,
    "sound-amd": None,
    "spills": "spill",
    "shared-memory": "bytes of shared memory, a block has 166912",
    "shared-memory-amd": "bytes of shared memory, a block has 65536",
    "conversions": "integers become floats in the loop",
    "shuffles": "shuffles: the packed order",
    "narrow": "no copy of 16 bytes in the loop",
    "budget": "instructions per weight, the budget is 0.5",
    "no-mma": "no HMMA.16816",
    "wrong-mma": "no HGMMA",
    "refused": "does not compile",
}


def report(root: Path, folder: Path, *arguments: str) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, verdicts and output of the script, in a process that compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (root / "tests/helpers", root / "scripts")))
    out = folder / "verdicts.json"
    script = str(root / "scripts" / "kernels_report.py")
    command = [sys.executable, script, "--no-docs", "--json", str(out), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert out.exists(), done.stdout + done.stderr
    return done.returncode, json.loads(out.read_text()), done.stdout


def test_every_kernel_passes_on_every_target(root: Path, tmp_path: Path) -> None:
    code, verdicts, output = report(root, tmp_path)
    failed = [line for line in output.splitlines() if line.startswith("FAILS")]
    assert not failed, "\n".join(failed)
    assert code == 0, output
    assert {v["target"] for v in verdicts} == {
        "sm_80",
        "sm_86",
        "sm_89",
        "sm_90",
        "sm_100",
        "sm_120",
        "gfx942",
    }


def test_each_planted_fault_is_found(root: Path, tmp_path: Path) -> None:
    code, verdicts, output = report(root, tmp_path, "--variants", "planted_kernels")
    assert code == 1
    assert {v["variant"]["name"] for v in verdicts} == set(REASONS)
    for verdict in verdicts:
        name, broken = verdict["variant"]["name"], "; ".join(verdict["broken"])
        reason = REASONS[name]
        assert (broken == "") if reason is None else (reason in broken), f"{name}: {broken}"
        assert (f"FAILS: {name} on" in output) == (reason is not None)
