"""POST /v1/quantizations and its jobs: from a body to a job's options, and what is shown of it."""

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, create_model, field_validator
from pydantic_core import to_json

from ..engine.errors import ConfigError, ConflictError, EngineError, NotFoundError, RequestError
from ..engine.model_files import ModelFiles, original_files
from ..engine.quantize.options import QuantizeOptions
from .cli_quantize import Quantize
from .errors import BRANCH, error_body
from .fleet import Fleet
from .job_store import JobRecord
from .job_texts import JobTexts
from .job_words import field_of, in_api_words, shown_message
from .jobs import Jobs

_KEEPALIVE_SECONDS = 15.0
_MAX_KNOWN = 20  # names in an error
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_OTHERWISE = {
    *("model", "out", "calibration", "eval_text", "max_nll_increase"),
    *("overwrite", "resume", "revision", "num_threads"),
}
_OWN = {"model", "output", "calibration", "evaluation", "gate"}  # the API's, not the CLI's
_NAME_OF_FILE, _TEXTS = f"{BRANCH}name", f"{BRANCH}texts"
_STRICT = ConfigDict(extra="forbid", strict=True)

Json = dict[str, Any]


class Texts(BaseModel):
    """Calibration text in the request itself."""

    model_config = _STRICT
    texts: Annotated[list[str], Field(min_length=1, max_length=1 << 16)]

    @field_validator("texts")
    @classmethod
    def _not_blank(cls, texts: list[str]) -> list[str]:
        if not any(text.strip() for text in texts):
            raise ValueError("holds empty texts only; give at least one with words")
        return texts


def _branch(source: object) -> str:
    """Of a union, so that errors are those of the form that was meant."""
    return _TEXTS if isinstance(source, (dict, Texts)) else _NAME_OF_FILE


class TextBody(BaseModel):
    """source: "default" is the built-in text; else a file under --data-dir (text, or .jsonl), or texts."""

    model_config = _STRICT
    source: Annotated[
        Annotated[str, Tag(_NAME_OF_FILE)] | Annotated[Texts, Tag(_TEXTS)], Discriminator(_branch)
    ] = "default"


class GateBody(BaseModel):
    """max_nll_increase: nats per token of held-out text that quantizing may cost."""

    model_config = _STRICT
    max_nll_increase: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class LoadBody(BaseModel):
    """POST /v1/models/load. model: a folder under --models-dir, or a served name."""

    model_config = _STRICT
    model: str
    alias: Annotated[str, Field(min_length=1, max_length=256)]
    strategy: Literal["both", "replace"] = "both"


class UnloadBody(BaseModel):
    """POST /v1/models/unload."""

    model_config = _STRICT
    model: str


@cache
def quantization_body() -> type[BaseModel]:
    """POST /v1/quantizations: the CLI's options, in snake_case, beside what the API has of its own."""
    hints = get_type_hints(Quantize, include_extras=True)
    hints["dynamic"] = dict[str, dict[str, int | bool]] | None  # the CLI's is JSON text, or a file of it
    options: Any = {
        field.name: (hints[field.name], field.default)
        for field in fields(Quantize)
        if field.name not in _OTHERWISE
    }
    return create_model(
        "QuantizationBody",
        __config__=_STRICT,
        __doc__="POST /v1/quantizations.",
        model=(str, ...),
        output=(str, ...),
        calibration=(TextBody, TextBody()),
        evaluation=(TextBody, TextBody()),
        gate=(GateBody | None, None),
        **options,
    )


class Quantizations:
    """The jobs of a server and the folders that they may touch."""

    def __init__(self, jobs: Jobs, fleet: Fleet, models_dir: Path, data_dir: Path | None) -> None:
        self.jobs = jobs
        self._fleet = fleet
        self._models_dir = models_dir
        self._data_dir = data_dir

    async def submit(self, fields: Json) -> JobRecord:
        """Queue a job. Errors: RequestError, NotFoundError, ConflictError, pydantic.ValidationError."""
        body: Any = quantization_body().model_validate(fields)
        model = self.model_folder(body.model)
        out = self._output(body.output)
        if body.gate is not None and not body.report:
            raise RequestError("'gate': needs the quality report; leave 'report' out", param="gate")
        layers = _original(model, body.model).config.get("num_hidden_layers")
        # Threads write the texts and the job, whatever becomes of the request: a job as a whole or none.
        return await asyncio.shield(self._queue(body, model, out, layers))

    async def _queue(self, body: Any, model: Path, out: Path, layers: int | None) -> JobRecord:
        async with self.jobs.texts() as kept:
            texts = {
                option: await asyncio.to_thread(
                    self._text, kept, getattr(body, name).source, f"{name}.source"
                )
                for name, option in (("calibration", "calibration"), ("evaluation", "eval_text"))
            }
            options = {**body.model_dump(exclude=_OWN), "model": str(model), "out": str(out), **texts}
            options["max_nll_increase"] = None if body.gate is None else body.gate.max_nll_increase
            _refuse_options(options)
            return await self.jobs.submit(_request(body, options), layers)

    def model_folder(self, name: str) -> Path:
        """Of a served name, or a folder under --models-dir. Errors: RequestError, NotFoundError."""
        if (known := self._fleet.folders.get(name)) is not None:
            return known
        folder = _inside(self._models_dir, name, "model", "--models-dir")
        if not _is_file(folder / "config.json"):
            raise NotFoundError(
                f"'model' {name:.200}: neither served nor a model under --models-dir; there are: "
                f"{self._known()}",
                param="model",
            )
        return folder

    def _known(self) -> str:
        """Names to choose from, for an error."""
        folders = (path.name for path in self._models_dir.iterdir() if _is_file(path / "config.json"))
        served = [model.name for model in self._fleet.models.all()]
        names = list(dict.fromkeys([*served, *sorted(name for name in folders if not name.startswith("."))]))
        more = f" and {len(names) - _MAX_KNOWN} more" if len(names) > _MAX_KNOWN else ""
        return ", ".join(f"'{name}'" for name in names[:_MAX_KNOWN]) + more

    def _output(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise RequestError(
                f"'output' {name:.200}: use letters, digits, '.', '_' and '-', no folders", param="output"
            )
        out = self._models_dir / name
        if out.exists():
            raise ConflictError(f"'output' {name}: exists already; choose another name", param="output")
        return out

    def _text(self, kept: JobTexts, source: "str | Texts", param: str) -> str | None:
        """The file to read, None for the built-in text."""
        if isinstance(source, Texts):
            return str(kept.write(source.texts))
        if source == "default":
            return None
        if self._data_dir is None:
            raise RequestError(
                f"'{param}' {source:.200}: the server has no folder of texts; start it with --data-dir, or "
                'send {"texts": [...]} instead of a name',
                param=param,
            )
        path = _inside(self._data_dir, source, param, "--data-dir")
        if not _is_file(path):
            raise NotFoundError(f"'{param}' {source:.200}: no file under --data-dir", param=param)
        return str(path)


def _request(body: Any, options: Json) -> Json:
    """What a job is kept with: the body, its texts by their number, and the task's options."""
    return {
        "model": body.model,
        "output": body.output,
        **body.model_dump(include=body.model_fields_set - _OWN),
        "calibration": {"source": _shown_source(body.calibration.source)},
        "evaluation": {"source": _shown_source(body.evaluation.source)},
        "gate": None if body.gate is None else body.gate.model_dump(),
        "options": options,
    }


def _original(model: Path, name: str) -> ModelFiles:
    """The files of a model that may be quantized. RequestError, in the API's words, where it is already."""
    try:
        return original_files(model)
    except ConfigError as error:  # which names its folder
        raise RequestError(in_api_words(error.message.replace(str(model), name)), param="model") from error


def _refuse_options(options: Json) -> None:
    """RequestError, in the API's words, for what the job would refuse without reading the model."""
    try:
        QuantizeOptions(**options)
    except ConfigError as error:
        raise RequestError(in_api_words(error.message), param=field_of(error.message)) from error


def _inside(root: Path, name: str, param: str, option: str) -> Path:
    """``root / name``. RequestError where it is not really inside, over symbolic links too."""
    try:
        path = (root / name).resolve()
    except (OSError, ValueError) as error:
        raise RequestError(f"'{param}': not a path", param=param) from error
    hidden = any(part.startswith(".") for part in Path(name).parts)
    if hidden or root.resolve() not in path.parents:
        raise RequestError(f"'{param}' {name:.200}: must lie under {option}", param=param)
    return path


def _is_file(path: Path) -> bool:
    """Also where a name is longer than the system's, which ``Path.is_file`` raises for."""
    try:
        return path.is_file()
    except OSError:
        return False


def _shown_source(source: "str | Texts") -> Any:
    return {"texts": len(source.texts)} if isinstance(source, Texts) else source


def shown(job: JobRecord) -> Json:
    """The API's job object, in its words: no options of the CLI's, no paths of the server's."""
    content = job.to_dict()
    del content["options"]
    if content["error"] is not None:
        message = shown_message(content["error"]["message"], job.request)
        content["error"] = content["error"] | {"message": message}
    if content["result"] is not None:
        content["result"] = _shown_result(content["result"], job.request)
    return content


def _shown_result(result: Json, request: Json) -> Json:
    """With the same care for the sentences in it."""
    shown = result | {"out": request["output"]}
    if "dense" in shown:
        shown["dense"] = {name: shown_message(why, request) for name, why in shown["dense"].items()}
    if "warnings" in shown:
        shown["warnings"] = [shown_message(line, request) for line in shown["warnings"]]
    prediction = shown.get("report", {}).get("prediction", {})
    if "reason" in prediction:
        prediction = prediction | {"reason": shown_message(prediction["reason"], request)}
        shown["report"] = shown["report"] | {"prediction": prediction}
    return shown


async def events(jobs: Jobs, job: JobRecord) -> AsyncIterator[bytes]:
    """Server-sent events: ``progress`` at each change, ``end`` once; comments keep the line open.

    Where the server leaves before the job has ended, an error is the last one.
    """
    watched, sent = jobs.watch(job), b""
    now = asyncio.get_running_loop().time
    due = now() + _KEEPALIVE_SECONDS  # by when something must be sent
    while True:
        item = asyncio.ensure_future(anext(watched, None))
        try:
            while not (await asyncio.wait({item}, timeout=max(0.0, due - now())))[0]:
                yield b": keep-alive\n\n"
                due = now() + _KEEPALIVE_SECONDS
        finally:
            item.cancel()
        content, ended = to_json(shown(job)), job.ended
        if ended or content != sent:  # a change may be another job's
            yield _event(b"end" if ended else b"progress", content)
            sent, due = content, now() + _KEEPALIVE_SECONDS
        if ended:
            return
        if jobs.leaving:
            left = EngineError(f"the server is shutting down; job {job.id} goes on when it starts again")
            yield _event(b"error", to_json(error_body(left)))
            return


def _event(kind: bytes, data: bytes) -> bytes:
    return b"event: " + kind + b"\ndata: " + data + b"\n\n"
