"""What the routes share: options, models, metrics, admission, and the phase of the server's life."""

from dataclasses import dataclass
from enum import Enum

from ..engine.errors import EngineError
from .limits import Admission
from .metrics import Metrics
from .models import ModelTable, ServedModel
from .settings import Settings


class Phase(Enum):
    """SERVING; DRAINING: not ready any more, but still served; CLOSED: only what runs is finished."""

    SERVING = "serving"
    DRAINING = "draining"
    CLOSED = "closed"


@dataclass(slots=True)
class Gateway:
    """One server. ``phase`` is the only thing that changes; lifecycle changes it."""

    settings: Settings
    models: ModelTable
    metrics: Metrics
    admission: Admission
    phase: Phase = Phase.SERVING

    def check_open(self) -> None:
        """Errors: EngineError once new work is not taken any more."""
        if self.phase is Phase.CLOSED:
            raise EngineError("the server is shutting down; send the request to another")

    def unhealthy(self) -> str | None:
        """Why a restart of this process is due, or None. A server that starts or drains is healthy."""
        for model in self.models.all():
            if model.client.gave_up.is_set():
                return f"the engine failed for good: {model.client.failure}"
            seconds = model.client.seconds_since_progress()
            if seconds > self.settings.hang_timeout:
                return f"the engine has made no step for {seconds:.0f} s"
        return None

    def not_ready(self) -> str | None:
        """Why requests should go elsewhere, or None."""
        if self.phase is not Phase.SERVING:
            return "the server is shutting down"
        for model in self.models.all():
            if reason := _not_loaded(model):
                return reason
        return "the queue is full" if self.admission.full else None


def _not_loaded(model: ServedModel) -> str | None:
    if model.client.ready.is_set():
        return None
    progress = model.client.progress
    if progress is None or not progress.total:
        return "the model is not loaded yet"
    return f"the model is loading: {progress.phase} {progress.done}/{progress.total}"
