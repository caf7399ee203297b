"""The folder that a run keeps its finished blocks in, hidden beside the checkpoint that it makes."""

import fcntl
import hashlib
import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from ... import __version__
from ..errors import ConfigError
from .options import QuantizeOptions, resumable
from .storage import general_spec
from .work import Log

_NO_MATTER = (  # to what the blocks hold
    *("out", "overwrite", "resume", "num_threads"),
    *("report", "eval_text", "eval_tokens", "predict", "max_nll_increase"),
)

WAIT_SECONDS = 20.0  # a killed server's process ends within them, once it has seen that


class Scratch:
    """A context manager. Without ``options.resume`` the folder is new, and gone in the end in every case.

    With it, its name is fixed; what a run of the same options and the same model left is taken over, and only
    success removes it. What another run left is removed, and ``log`` is told. Errors: ConfigError where
    another process works in it (and, with it, goes on for WAIT_SECONDS), or it cannot be written.
    """

    def __init__(self, out: Path, options: QuantizeOptions, model: Path, log: Log) -> None:
        self._keep = options.resume
        self._log = log
        self._out = out
        self._print = _fingerprint(options, model)
        self.folder = resumable(out) if options.resume else out.parent / f".{out.name}.{os.getpid()}.work"
        self._lock = -1

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder, os.O_RDONLY)
            self._take(WAIT_SECONDS if self._keep else 0.0)
            note = self.folder / "run.json"
            before = note.read_text() if note.exists() else None
            if before != self._print:
                if before is not None:
                    other = _differing(before, self._print)
                    self._log(f"Begins anew: what an earlier run left, with {other}, is removed")
                for path in self.folder.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                note.write_text(self._print)
        except BlockingIOError as error:
            os.close(self._lock)
            raise ConfigError(
                f"OUT {self._out}: another run is making it; wait, or choose another"
            ) from error
        except OSError as error:
            raise ConfigError(f"OUT {self._out}: cannot be written ({error.strerror or error})") from error
        return self

    def _take(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or not self._keep:
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)


def _differing(before: str, now: str) -> str:
    """What of two fingerprints is not the same, for people: options by name, else what is beside them."""
    try:
        was, is_ = json.loads(before), json.loads(now)
    except ValueError:  # killed while it was written
        return "unreadable options"
    options = [name for name in is_["options"] if is_["options"][name] != was["options"].get(name)]
    return "other " + ", ".join(options or [part for part in is_ if is_[part] != was.get(part)])


def _fingerprint(options: QuantizeOptions, model: Path) -> str:
    """Of whatever the blocks depend on."""
    given = {name: value for name, value in asdict(options).items() if name not in _NO_MATTER}
    files = {
        path.name: [path.stat().st_size, path.stat().st_mtime_ns]
        for path in sorted(model.iterdir())
        if path.suffix in (".json", ".safetensors")
    }
    if options.calibration is not None:
        given["calibration_sha256"] = _digest(Path(options.calibration).expanduser())
    rounding = asdict(general_spec(options))  # what the options stand for, which may change between versions
    found = {"nybble": __version__, "options": given, "rounding": rounding, "model": files}
    return json.dumps(found, sort_keys=True)


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
