"""What is served: a name, its tokenizer, template and engine; and the routes that list it."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engine.chat_template import ChatTemplate
from ..engine.client import EngineClient
from ..engine.errors import EngineError
from ..engine.model_files import ModelFiles
from ..engine.records import ModelInfo
from ..engine.tokenizer import Tokenizer
from .errors import ModelNotFoundError
from .metrics import Metrics, ModelMetrics
from .settings import Settings

DEMO_NAME = "nybble-demo"
FilesState = frozenset[tuple[str, int, int]]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model and the engine that runs it.

    root: what is served under the name, see ``root_of``. files: see ``state_of``, from before they were read.
    settings: the server's, as they are for this model.
    sampling_defaults: under SamplingParams' names, from generation_config ({} where that is turned off).
    stated_max_model_len: what --max-model-len or the model's files say, until the engine has said it.
    """

    name: str
    folder: Path
    root: str
    files: FilesState
    settings: Settings
    created: int
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    client: EngineClient
    metrics: ModelMetrics
    sampling_defaults: dict[str, float | int]
    stated_max_model_len: int

    @property
    def info(self) -> ModelInfo:
        """What the engine loaded. Errors: EngineError while it is not ready."""
        info = self.client.info
        if info is None or not self.client.ready.is_set():
            raise EngineError(f"the engine of model '{self.name}' is not ready: {self._state()}; try again")
        return info

    @property
    def max_model_len(self) -> int:
        """Tokens of a prompt and its output at most."""
        info = self.client.info
        return self.stated_max_model_len if info is None else info.max_model_len

    def _state(self) -> str:
        if self.client.gave_up.is_set():
            return "it failed and is not started again"
        return "it is being restarted" if self.client.restarts else "it is loading"

    def card(self) -> dict[str, Any]:
        """OpenAI's model object, with vLLM's ``root``, ``parent`` and ``max_model_len``."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "nybble",
            "root": self.root,
            "parent": None,
            "max_model_len": self.max_model_len,
        }


class ModelTable:
    """Models by name. A name is switched from one model to another between two requests."""

    def __init__(self, models: Iterable[ServedModel] = ()) -> None:
        self._models = {model.name: model for model in models}

    def put(self, model: ServedModel) -> ServedModel | None:
        """New requests for its name go to ``model``; returns the one that had the name."""
        before = self._models.get(model.name)
        self._models[model.name] = model
        return before

    def remove(self, name: str) -> ServedModel:
        """New requests for the name find none. Errors: ModelNotFoundError."""
        model = self.get(name)
        del self._models[name]
        return model

    def get(self, name: str | None) -> ServedModel:
        """The model of that name, or the only one where a request names none. Errors: ModelNotFoundError."""
        if name is None and len(self._models) == 1:
            return next(iter(self._models.values()))
        model = self._models.get(name or "")
        if model is None:
            served = ", ".join(f"'{known}'" for known in self._models)
            asked = f"'{name:.200}'" if name else "(none named)"
            raise ModelNotFoundError(f"the model {asked} does not exist; served: {served}", param="model")
        return model

    def all(self) -> list[ServedModel]:
        """In the order in which they were given."""
        return list(self._models.values())


def served_name(settings: Settings) -> str:
    """--served-model-name, else the hub id, the folder's name, or the demo's."""
    return _given_name(settings) if settings.served_model_name is None else settings.served_model_name


def root_of(settings: Settings, folder: Path) -> str:
    """Where a model comes from: its path under --models-dir, else its hub id, folder's name or the demo's."""
    root = settings.models_dir
    if root is not None and root in folder.parents:
        return str(folder.relative_to(root))
    return _given_name(settings)


def state_of(folder: Path) -> FilesState:
    """Names, sizes and times of the files in ``folder``: another state, perhaps another model."""
    return frozenset((path.name, *_size_and_time(path)) for path in folder.iterdir())


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except FileNotFoundError:  # a link to nowhere (editors lock files so), or removed meanwhile
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _given_name(settings: Settings) -> str:
    if settings.model is None:
        return DEMO_NAME
    folder = Path(settings.model).expanduser()
    return folder.resolve().name if folder.is_dir() else settings.model


def load_model(
    settings: Settings, folder: Path, name: str, client: EngineClient, metrics: Metrics
) -> ServedModel:
    """What the gateway itself needs of the model in ``folder``. Errors: ConfigError."""
    state, files = state_of(folder), ModelFiles(folder)
    longest = files.max_model_len()
    tokenizer = Tokenizer.from_folder(folder)
    return ServedModel(
        name=name,
        folder=folder,
        root=root_of(settings, folder),
        files=state,
        settings=settings,
        created=int(time.time()),
        tokenizer=tokenizer,
        chat_template=ChatTemplate.from_folder(folder, tokenizer.special_tokens, settings.chat_template),
        client=client,
        metrics=metrics.of(name),
        sampling_defaults=files.sampling_defaults() if settings.generation_config == "auto" else {},
        stated_max_model_len=settings.max_model_len or longest,
    )
