"""Text that came in the body of a request, in files for as long as a job may read them."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..engine.errors import EngineError
from .job_store import JobRecord

logger = logging.getLogger("nybble")
_OPTIONS = ("calibration", "eval_text")  # that may name such a file


class JobTexts:
    """The files in one folder, named by what they hold: jobs of the same text share one, and a run that goes
    on after a restart finds it where it was. Blocking: call it from a thread; one call at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, texts: Sequence[str]) -> Path:
        """The file of these texts. EngineError where it cannot be written."""
        # JSON lines keep a text whole that contains the separator of documents.
        content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        path = self._folder / f"texts-{hashlib.sha256(content).hexdigest()[:32]}.jsonl"
        partial = path.with_suffix(".partial")  # a job may be reading the file that is there
        try:
            self._folder.mkdir(exist_ok=True)
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            raise EngineError(f"the texts cannot be stored ({error.strerror or error})") from error
        return path

    def keep(self, readers: Iterable[JobRecord]) -> None:
        """Remove what none of ``readers`` names."""
        named = (job.request["options"].get(option) for job in readers for option in _OPTIONS)
        kept = {Path(path).name for path in named if path is not None}
        for path in self._folder.glob("texts-*"):
            if path.name not in kept:
                try:
                    path.unlink()
                except OSError as error:
                    logger.error("%s cannot be removed: %s", path, error)
