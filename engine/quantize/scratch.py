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
from .results import Stage
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
    success removes it. What another run left stays, an error; with ``options.overwrite``, or where "anew" is
    to resume, it is removed, and ``log`` is told. num_blocks: of the model, for what is told of an interrupt.
    Errors: ConfigError; also where another process works in it (and goes on for WAIT_SECONDS), or it cannot
    be written.
    """

    def __init__(
        self, out: Path, options: QuantizeOptions, model: Path, log: Log, num_blocks: int = 0
    ) -> None:
        self._keep = bool(options.resume)
        self._anew = options.overwrite or options.resume == "anew"
        self._told = options.resume != "anew"  # whose interrupt is a server's, which knows what comes next
        self._log = log
        self._out = out
        self._num_blocks = num_blocks
        self._print = _fingerprint(options, model)
        self.folder = resumable(out) if options.resume else out.parent / f".{out.name}.{os.getpid()}.work"
        self._lock = -1

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder, os.O_RDONLY)
            try:
                self._take(WAIT_SECONDS if self._keep else 0.0)
                self._begin()
            except BaseException:
                os.close(self._lock)
                raise
        except BlockingIOError as error:
            raise ConfigError(
                f"OUT {self._out}: another run is making it; wait, or choose another"
            ) from error
        except OSError as error:
            raise ConfigError(f"OUT {self._out}: cannot be written ({error.strerror or error})") from error
        left = resumable(self._out)
        if not self._keep and left.exists():
            self._log(f"{left.name}: finished blocks of an interrupted run stay there, unused by this one")
        return self

    def _begin(self) -> None:
        """Take over what lies in the folder, or empty it."""
        note = self.folder / "run.json"
        before = note.read_text() if note.exists() else None
        if before == self._print:
            return
        if before is not None:
            other = _differing(before, self._print)
            if not self._anew:
                raise ConfigError(
                    f"OUT {self._out}: what an earlier run left has {other}; to go on give the same again, "
                    "to begin anew choose another folder or add --overwrite"
                )
            self._log(f"Begins anew: what an earlier run left, with {other}, is removed")
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        partial = note.with_suffix(".partial")
        partial.write_text(self._print)
        partial.replace(note)

    def _take(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        waited = False
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise
                if not waited:
                    self._log(f"another run is making {self._out}; waits up to {seconds:.0f} s for its end")
                waited = True
                time.sleep(0.1)
        if not _is(self._lock, self.folder):  # removed by the run that was waited for: it succeeded
            raise ConfigError(
                f"OUT {self._out}: another run was making it, and has ended; look at what it made, or choose "
                "another"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or not self._keep:
            shutil.rmtree(self.folder, ignore_errors=True)
        elif self._told and isinstance(error, KeyboardInterrupt):
            self._log(f"{self._kept()} kept in {self.folder.name}; the same command goes on")
        os.close(self._lock)

    def _kept(self) -> str:
        """Finished blocks, by pass where there are several."""
        stages = {path.name: len(Stage(path)) for path in sorted(self.folder.iterdir()) if path.is_dir()}
        done = {name: f"{count} of {self._num_blocks} blocks" for name, count in stages.items() if count}
        if len(done) > 1:
            return ", ".join(f"{name}: {blocks}" for name, blocks in done.items())
        return next(iter(done.values()), f"0 of {self._num_blocks} blocks")


def _is(handle: int, path: Path) -> bool:
    """Whether what is open is what lies there."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _differing(before: str, now: str) -> str:
    """What of two fingerprints is not the same, for people: options by name, else what is beside them."""
    try:
        was, is_ = json.loads(before), json.loads(now)
    except ValueError:  # an earlier version wrote it in place, and was killed
        return "unreadable options"
    options = [name for name in is_["options"] if is_["options"][name] != was["options"].get(name)]
    parts = {"nybble": "version of Nybble"}
    differing = [parts.get(part, part) for part in is_ if is_[part] != was.get(part)]
    return "other " + ", ".join([name.replace("_", "-") for name in options] or differing)


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
