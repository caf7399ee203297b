"""How well a model predicts text: negative log-likelihood, and the distance to another model.

``scoring`` says what is scored. Scores are exact for the dtype asked for (torch's kernels), or, where a
kernel option is given, what ``nybble serve`` computes with it (``scorers``), so that the cost of rounded
activations can be read off. Two models in fp32 on a CPU are read block by block (``compare``), so that none
has to fit into memory.
"""

import json
import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch

from .compare import compare
from .config import CpuActivations, CpuKernels, DType, EngineConfig
from .documents import Documents, Encoder, read_documents
from .errors import ConfigError
from .model.plan import layer_plan
from .model.streamed import StreamedModel
from .model_files import ModelFiles, resolve_model
from .quality import Side, describe_text, quality_report, weight_errors
from .quality_page import page
from .scorers import Scorer, ScoringModel, ServedScorer, score_windows
from .scoring import BATCH_TOKENS, Passage, Score, read_windows
from .tokenizer import Tokenizer

SHIPPED_TEXT = Path(__file__).parent / "quantize" / "evaluation.txt"

Progress = Callable[[str, int, int], None]
Log = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """model, against: folders or hub ids. text: see ``read_documents``; None: a short one in this package.

    max_len: tokens of context, None: the model's. max_documents, max_tokens: score only the first ones.
    cpu_kernels, cpu_activations, lm_head_bits: score as served with them; without ``against``, rounded
    activations and a rounded head are compared with exact ones. json, html: files for the report of a
    comparison.
    """

    model: str
    against: str | None = None
    text: str | None = None
    revision: str | None = None
    dtype: DType = "float32"
    max_len: int | None = None
    max_documents: int | None = None
    max_tokens: int | None = None
    num_threads: int | None = None
    cpu_kernels: CpuKernels | None = None
    cpu_activations: CpuActivations | None = None
    lm_head_bits: int | None = None
    json: str | None = None
    html: str | None = None

    def __post_init__(self) -> None:
        for option, given, kind in (
            ("--dtype", self.dtype, DType),
            ("--cpu-kernels", self.cpu_kernels, CpuKernels),
            ("--cpu-activations", self.cpu_activations, CpuActivations),
        ):
            if given is not None and given not in get_args(kind):
                raise ConfigError(f"{option} {given}: use {', '.join(get_args(kind))}")
        if self.lm_head_bits not in (None, 4, 8):
            raise ConfigError(f"--lm-head-bits {self.lm_head_bits}: use 4 or 8, or leave it out")
        for option, value, least in (
            ("--max-len", self.max_len, 4),
            ("--max-documents", self.max_documents, 1),
            ("--max-tokens", self.max_tokens, 1),
            ("--num-threads", self.num_threads, 1),
        ):
            if value is not None and value < least:
                raise ConfigError(f"{option} {value}: must be at least {least}")
        for option, path in (("--json", self.json), ("--html", self.html)):
            if path is not None and self.against is None:
                raise ConfigError(f"{option} {path}: reports a comparison; add --against ORIGINAL")
            if path is not None and not Path(path).expanduser().absolute().parent.is_dir():
                raise ConfigError(f"{option} {path}: its folder does not exist")


class _Task:
    """One evaluation: what is scored, by which models."""

    def __init__(self, options: EvaluateOptions, progress: Progress, log: Log) -> None:
        self.options, self.progress, self.log = options, progress, log
        self.folder = resolve_model(options.model, options.revision)
        self.other = None if options.against is None else resolve_model(options.against)
        self.max_len, self.documents, self.passage = self._read()
        longest = max(len(window.token_ids) for window in self.passage.windows)
        self.served = _served_config(options, self.folder, longest)

    def _read(self) -> tuple[int, Documents, Passage]:
        options, files = self.options, ModelFiles(self.folder)
        source = options.text or SHIPPED_TEXT
        max_len = files.max_model_len()
        if options.max_len is not None:
            if options.max_len > max_len:
                raise ConfigError(f"--max-len {options.max_len}: the model's context is {max_len}")
            max_len = options.max_len
        encoder = Encoder(self.folder, Tokenizer.from_folder(self.folder))
        prefix = next(iter(files.eos_token_ids()), None)
        found = read_documents(source, "--text")
        passage = read_windows(
            found, encoder, prefix, max_len, options.max_documents, max_tokens=options.max_tokens
        )
        if not passage.windows:
            raise ConfigError(f"--text {source}: holds no text that could be scored; give another file")
        self.log(f"{passage.num_scored} tokens{_of_bytes(passage)} of {found.name}")
        return max_len, found, passage

    def run(self) -> dict[str, Any]:
        """The figures."""
        scores: dict[str, Any] = {
            "model": str(self.folder),
            "text": self.documents.name,
            "dtype": self.options.dtype,
        }
        scores |= {} if self.options.lm_head_bits is None else {"lm_head_bits": self.options.lm_head_bits}
        if self.other is None:
            score, kernel, compared = self._score()
            scores |= {} if kernel is None else {"kernel": kernel}
            scores |= {"against": "itself in fp32"} if compared else {}
            return scores | score.figures(compared) | self._bytes(score)
        scores["against"] = str(self.options.against)
        with ExitStack() as stack:
            model, original = (stack.enter_context(StreamedModel(f)) for f in (self.folder, self.other))
            _check_vocabulary(self.passage, model, original, self.options)
            layers = []
            if self._side_by_side(model, original):
                found = compare(original, model, self.passage.windows, self.progress)
                score, layers = found.score, found.layer_errors
            else:
                score, kernel, _ = self._score()
                scores |= {} if kernel is None else {"kernel": kernel}
            modules = weight_errors(model, original) if _linears(model) == _linears(original) else {}
            sides = Side.of(self.folder.name, model), Side.of(self.other.name, original)
        text = describe_text(self.documents, self.passage, self.max_len)
        report = quality_report(score, sides, text, layers)
        report["modules"] = [{"name": name, "weight_error": error} for name, error in modules.items()]
        self._write(report)
        return scores | score.figures(True) | self._bytes(score) | {"report": report}

    def _side_by_side(self, model: StreamedModel, original: StreamedModel) -> bool:
        """Whether both can be compared block by block, exactly, where that is as quick as whole models."""
        alike = (model.num_layers, model.hidden_size) == (original.num_layers, original.hidden_size)
        plain = self.served is None and self.options.dtype == "float32"
        if not alike:
            self.log("the models differ in blocks or width: no errors by layer")
        elif not plain:
            self.log("errors by layer need an exact score; those by module are of the weights as stored")
        return alike and plain and not torch.cuda.is_available()

    def _score(self) -> tuple[Score, str | None, bool]:
        """By loaded models; the kernel, where it was chosen, and whether there was something to compare."""
        model: ScoringModel
        original: ScoringModel | None = None
        dtype = self.options.dtype
        kernel = None
        if self.served is None:
            model = Scorer(self.folder, dtype, self.progress)
        else:
            dtype = "float32"
            model = ServedScorer(self.served, self.progress, self.log)
            kernel = model.kernel
        if self.other is not None:
            original = Scorer(self.other, dtype, self.progress)
        else:
            _check_vocabulary(self.passage, model, model, self.options)
            if self.served is not None and _rounds(self.served):
                exact = replace(self.served, dtype="float32", cpu_activations="fp32", lm_head_bits=None)
                original = ServedScorer(exact, self.progress, lambda _: None)
        score = score_windows(self.passage.windows, model, original, self.progress)
        return score, kernel, original is not None

    def _bytes(self, score: Score) -> dict[str, Any]:
        num_bytes = self.passage.num_bytes
        if num_bytes is None:
            return {"num_bytes": None, "bits_per_byte": None}
        return {"num_bytes": num_bytes, "bits_per_byte": score.nll / math.log(2) / num_bytes}

    def _write(self, report: dict[str, Any]) -> None:
        if self.options.json is not None:
            content = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
            _replace(Path(self.options.json).expanduser(), content, "--json")
        if self.options.html is not None:
            _replace(Path(self.options.html).expanduser(), page(report), "--html")


def _replace(path: Path, content: str, option: str) -> None:
    """Write a file as a whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(content, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot be written ({error.strerror or error})") from error
    finally:
        partial.unlink(missing_ok=True)


def _linears(model: StreamedModel) -> list[tuple[str, int, int]]:
    """Those of the blocks: name, outputs, inputs. Models that have the same can be told their errors."""
    slots = [slot for index in range(model.num_layers) for slot in layer_plan(model.config, index)]
    parts = [part for slot in slots if slot.kind == "linear" for part in slot.parts]
    return [(part.name, part.out_features, part.in_features) for part in parts]


def _of_bytes(passage: Passage) -> str:
    return "" if passage.num_bytes is None else f", {passage.num_bytes} bytes"


def _check_vocabulary(
    passage: Passage,
    model: ScoringModel | StreamedModel,
    original: ScoringModel | StreamedModel,
    options: EvaluateOptions,
) -> None:
    if original.vocab_size != model.vocab_size:
        raise ConfigError(
            f"--against {options.against}: has {original.vocab_size} tokens, MODEL has "
            f"{model.vocab_size}; compare models of one vocabulary"
        )
    if passage.highest_id >= model.vocab_size:
        raise ConfigError(
            f"MODEL {options.model}: its tokenizer gives id {passage.highest_id}, but it has "
            f"{model.vocab_size} tokens"
        )


def evaluate(options: EvaluateOptions, progress: Progress, log: Log) -> dict[str, Any]:
    """Run it. Returns the figures, of JSON types only. Errors: ConfigError and its children."""
    return _Task(options, progress, log).run()


def _served_config(options: EvaluateOptions, folder: Path, longest: int) -> EngineConfig | None:
    """The engine that a kernel option asks for; None: no such option. ``longest``: a window's tokens."""
    if options.cpu_kernels is None and options.cpu_activations is None and options.lm_head_bits is None:
        return None
    tokens = max(BATCH_TOKENS, longest)
    return EngineConfig(
        str(folder),
        "cpu",
        options.dtype,
        max_model_len=longest,
        max_num_seqs=1,  # unused: whole windows are computed at once
        max_num_batched_tokens=tokens,
        num_threads=options.num_threads,
        cpu_kernels=options.cpu_kernels or "auto",
        cpu_activations=options.cpu_activations,
        lm_head_bits=options.lm_head_bits,
    )


def _rounds(config: EngineConfig) -> bool:
    """Whether an engine computes with less than the checkpoint holds."""
    return config.low_bit_activations != "fp32" or config.lm_head_bits is not None
