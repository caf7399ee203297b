"""Gates of quantization jobs: what did not pass its own is not served."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..engine.model_files import PROVENANCE, ModelFiles, compared
from .job_store import JobRecord

Json = dict[str, Any]


def refused_by_gate(folder: Path, jobs: Sequence[JobRecord]) -> str | None:
    """Why the checkpoint in ``folder`` must not be loaded, or None: it carries the verdict itself, so that it
    holds without the job, in a copy, and on another server. One from before it did is looked up in ``jobs``,
    the oldest first. Errors: CheckpointError."""
    origin = ModelFiles(folder).config.get(PROVENANCE)
    gate = None
    if isinstance(origin, dict):
        gate = origin["gate"] if "gate" in origin else _recorded_gate(folder.resolve(), jobs)
    if gate is None or (isinstance(gate, dict) and gate.get("passed") is True):
        return None
    try:
        told = f"NLL {compared(gate)}"
    except (TypeError, KeyError, ValueError):
        told = f"its config.json says {str(gate)[:100]}"
    return f"did not pass its gate: {told}; quantize the original again, with more bits or a larger gate"


def _recorded_gate(folder: Path, jobs: Sequence[JobRecord]) -> Json | None:
    """The verdict on what the last job of ``folder``, which has many spellings, made there."""
    for job in reversed(jobs):
        if job.result is not None and Path(job.request["options"]["out"]).resolve() == folder:
            return job.result.get("gate")
    return None
