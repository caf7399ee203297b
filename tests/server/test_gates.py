"""Which checkpoints a gate keeps from being loaded: by what they say themselves, else by their job."""

import json
from pathlib import Path
from typing import Any

import pytest
from nybble.server.gates import refused_by_gate
from nybble.server.job_store import JobRecord


@pytest.mark.parametrize(
    ("gate", "refused"),
    [
        (None, False),
        ({"max_nll_increase": 0.1, "nll_increase": 0.05, "passed": True}, False),
        ({"max_nll_increase": 0.1, "nll_increase": 0.15, "passed": False}, True),
        ({"max_nll_increase": "?", "passed": "True"}, True),
        ({}, True),
        ("passed", True),
    ],
)
def test_only_a_gate_that_was_passed_is_passed(gate: Any, refused: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"provenance": {"gate": gate}}))
    assert (refused_by_gate(tmp_path, []) is not None) == refused


@pytest.mark.parametrize(("origin", "refused"), [({}, True), ({"gate": None}, False), (None, False)])
def test_the_last_job_knows_a_gate_that_its_checkpoint_does_not(
    origin: Any, refused: bool, tmp_path: Path
) -> None:
    """Of before it did. Not that of one that was made otherwise since, nor of another model in its place."""

    def job(out: str, result: Any) -> JobRecord:
        return JobRecord(out, 0, {"options": {"out": str(tmp_path / out)}}, "succeeded", result=result)

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(json.dumps({"provenance": origin}))
    bad, good = ({"gate": {"max_nll_increase": 0, "nll_increase": 1, "passed": p}} for p in (False, True))
    last = [job("mine", good), job("mine", bad), job("mine", None), job("other", good)]
    assert (refused_by_gate(tmp_path / "mine", last) is not None) == refused
    assert refused_by_gate(tmp_path / "mine", [job("mine", bad), job("mine", good)]) is None
    assert refused_by_gate(tmp_path / "mine", [job("mine", bad), job("mine", {})]) is None
