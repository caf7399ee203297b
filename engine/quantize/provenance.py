"""Where a checkpoint comes from: ``config.json["provenance"]``, whatever its format.

{"tool", "method", "settings", "options", "model", "calibration", "versions", "quality", "gate"}: enough to
make it again, to tell whether that was done, and whether servers may load it. No time and no path: the same
run gives the same bytes. Other readers of config.json keep keys that they do not know.
"""

import hashlib
import platform
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from ... import __version__
from .calibrate import Calibration
from .options import QuantizeOptions
from .source import Source

_LIBRARIES = ("torch", "numpy", "safetensors", "tokenizers")
_NOT_THE_RESULT = (
    *("model", "out", "overwrite", "resume", "num_threads", "calibration"),
    *("report", "eval_text", "eval_tokens", "predict", "max_nll_increase"),
)


def provenance(
    options: QuantizeOptions, settings: dict[str, Any], calibration: Calibration | None, source: Source
) -> dict[str, Any]:
    """The block, its quality and the gate yet to be measured. settings: the method's own."""
    chosen = {key: value for key, value in asdict(options).items() if key not in _NOT_THE_RESULT}
    return {
        "tool": f"nybble {__version__}",
        "method": options.method,
        "settings": settings,
        "options": chosen,
        "model": {"name": source.model.folder.name, "tensors_sha256": _fingerprint(source)},
        "calibration": None if calibration is None else describe(calibration),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES},
        "quality": None,
        "gate": None,
    }


def describe(calibration: Calibration) -> dict[str, Any]:
    """Of the text: its name, its hash, and what was taken of it."""
    return {
        "name": calibration.name,
        "sha256": calibration.sha256,
        "sequences": len(calibration.sequences),
        "tokens": calibration.num_tokens,
    }


def _fingerprint(source: Source) -> str:
    """SHA-256 over the original's tensors by name: dtype, shape and bytes."""
    digest = hashlib.sha256()
    for name in sorted(source.files):
        info = source.files.tensors[name]
        digest.update(f"{name}\0{info}\0".encode())
        with info.path.open("rb") as file:
            start = int.from_bytes(file.read(8), "little") + 8
            file.seek(start + info.begin)
            left = info.nbytes
            while left:
                chunk = file.read(min(left, 1 << 22))
                digest.update(chunk)
                left -= len(chunk)
    return digest.hexdigest()
