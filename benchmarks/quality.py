"""What quantizing costs, method by method: ``python benchmarks/quality.py``.

Cells: model x method x bits x seed (of the calibration's documents, and of YAQA's sketch). Each is quantized
as ``nybble quantize`` does it and scored on held-out text of the model's own kind and on WikiText: NLL, KL
and top-1 agreement with the original, bits per weight with every byte counted, seconds. A cell is a JSON file
under .cache/bench/quality/, and is not computed again; YAQA's sketches are kept per model and seed.

    python benchmarks/quality.py --list
    python benchmarks/quality.py --cells demo/gptq demo/requant --bits 3 --seeds 0
    python benchmarks/quality.py --minutes 9      # as many cells as fit; again and again until all are there
    python benchmarks/quality.py --report         # the table and the plot of those that are there
    python benchmarks/quality.py --restore benchmarks/results/quality.json  # on another machine

The grid differentiates 16 sequences, integrates with 8 intervals and scores 64 k tokens (WikiText: 16 k). The
cells named ``...-full`` do it with 32 intervals, 100 sequences and the whole texts (tiny1m, seed 0, 3 bits):
whether they rank the bases as the grid does is told as Spearman's coefficient. Models: the demo, and tiny1m
of ../shared/data, whose texts are used too; without it the demo has the texts in the package.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import ROOT, environment
from nybble.engine.documents import Encoder, read_documents
from nybble.engine.evaluate import EvaluateOptions, evaluate
from nybble.engine.quantize.job import quantize
from nybble.engine.quantize.options import QuantizeOptions
from nybble.engine.scoring import read_windows
from nybble.engine.tokenizer import Tokenizer
from quality_report import report
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SHARED = ROOT / "../shared/data"
CACHE = ROOT / ".cache" / "bench" / "quality"
SEPARATOR = "<|endoftext|>"
HELD_OUT = 0.03  # of the stories' bytes, the last ones: scripts/demo_data.py keeps them from training
BITS = (4, 3, 2)
GRID = {"gradient_samples": 16, "pqi_intervals": 8}
FULL = {"gradient_samples": 100, "num_samples": 100, "pqi_intervals": 32}
EVAL_TOKENS = {"own": 1 << 16, "wiki": 1 << 14}  # the second text is a third of the time, and says less
# Seeds say nothing where nothing is calibrated; the variants of one method are for seed 0 only.
ONCE = ("rtn", "rtn-plain", "gptq-plain", "gptq-gar", "2:4-magnitude", "gptq-512", "yaqa-512")

Options = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Model:
    """folder: the original. group_size: one that its linears' inputs are multiples of."""

    name: str
    folder: Path
    group_size: int


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the grid."""

    model: Model
    method: str
    bits: int
    seed: int
    options: Options

    @property
    def name(self) -> str:
        """model/method/bits/seed."""
        return f"{self.model.name}/{self.method}/{self.bits}/{self.seed}"

    @property
    def path(self) -> Path:
        """Its result."""
        return CACHE / "cells" / f"{self.name.replace('/', '_')}.json"


def models() -> list[Model]:
    """Those that are there."""
    found = [
        Model("demo", ROOT / "engine" / "demo" / "bf16", 64),
        Model("tiny1m", SHARED / "models/tiny1m", 32),
    ]
    return [model for model in found if model.folder.is_dir()]


def methods(bits: int, group_size: int) -> dict[str, Options]:
    """Name -> options. Asymmetric codes are for none: every format and kernel takes symmetric ones."""
    tuned = {"mse": 2.4}
    bases: dict[str, Options] = {"rtn": tuned, "awq": {}, "gptq": tuned, "yaqa": tuned}
    found: dict[str, Options] = {name: {"method": name, **more} for name, more in bases.items()}
    found["rtn-plain"] = {"method": "rtn"}
    found["gptq-plain"] = {"method": "gptq"}
    found["gptq-actorder"] = {"method": "gptq", "actorder": "group", **tuned}
    found["gptq-gar"] = {"method": "gptq", "actorder": "gar", **tuned}
    found |= {
        f"requant-{name}": {"method": "requant", "base": name, **more, **GRID} for name, more in bases.items()
    }
    if bits < 4:
        # Bits and groups of each module chosen within the bytes that the base takes at these bits.
        for name in ("gptq", "yaqa"):
            found[f"{name}-512"] = {**found[name], "num_samples": 512}  # YAQA's sketch gains from more
            found[f"requant-{name}-budget"] = {**found[f"requant-{name}"], "bytes_of": name}
    found["gwq"] = {"method": "gwq", **tuned, "gradient_samples": 16}
    # The base, given the bytes that residuals take, as smaller groups.
    for name in ("gptq", "yaqa"):
        found[f"{name}-g{group_size // 2}"] = {"method": name, "group_size": group_size // 2, **tuned}
    if bits == 4:
        found["2:4+int4"] = {"method": "sparse24"}
        found["2:4+int4-apart"] = {"method": "sparse24", "joint": False}
    return found


def cells() -> Iterator[Cell]:
    """All, seed by seed."""
    return (cell for cell in _every() if cell.seed == 0 or cell.method not in ONCE)


def _every() -> Iterator[Cell]:
    for seed in range(3):
        for model in models():
            for bits in BITS:
                for name, options in methods(bits, model.group_size).items():
                    yield Cell(model, name, bits, seed, options)
            for prune in ("magnitude", "wanda", "sparsegpt"):
                yield Cell(model, f"2:4-{prune}", 16, seed, {"method": "sparse24", "prune": prune})
    for model in models():
        for name, options in methods(3, model.group_size).items():
            # Of the demo they would take hours of a CPU: 25 times the gradients of the grid.
            grid = name.startswith("requant-") and not name.endswith("-budget")
            if grid and model.name == "tiny1m":
                yield Cell(model, f"{name}-full", 3, 0, {**options, **FULL})


def texts() -> dict[str, Path | None]:
    """calibration, own (held out), wiki: files that are made of ../shared/data; None: the package's own."""
    stories, wiki = SHARED / "text/tinystories.txt", SHARED / "text/wiki.test.raw"
    found: dict[str, Path | None] = {
        "calibration": None,
        "own": None,
        "wiki": wiki if wiki.exists() else None,
    }
    if stories.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        documents = [part.strip() for part in stories.read_text(encoding="utf-8").split(SEPARATOR)]
        documents = [document for document in documents if len(document) > 60]
        sizes = [len(document.encode()) for document in documents]
        kept, left = len(documents), HELD_OUT * sum(sizes)
        while left > 0:
            kept -= 1
            left -= sizes[kept]
        for name, part in (("calibration", documents[:kept]), ("own", documents[kept:])):
            path = CACHE / f"{name}.txt"
            path.write_text(SEPARATOR.join(part), encoding="utf-8")
            found[name] = path
    return found


def compute(cell: Cell, files: dict[str, Path | None], told: Callable[[str], None]) -> dict[str, Any]:
    """Quantize, score on both texts, forget the checkpoint."""
    full = cell.method.endswith("-full")
    out = CACHE / "out" / cell.name.replace("/", "_")
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    given = options_of(cell)
    options = QuantizeOptions(
        str(cell.model.folder),
        str(out),
        bits=cell.bits,
        seed=cell.seed,
        calibration=None if files["calibration"] is None else str(files["calibration"]),
        eval_text=None if files["own"] is None else str(files["own"]),
        eval_tokens=None if full else EVAL_TOKENS["own"],
        predict=False,
        **given,
    )
    began = time.process_time()
    kept = CACHE / "kept" / f"{cell.model.name}-{cell.seed}"
    try:
        summary = quantize(options, lambda phase, *_: told(phase), lambda _: None, kept)
        found = {
            "own": _figures(summary["report"]),
            "bits_per_weight": summary["bits_per_weight"],
            "bits_per_quantized_weight": summary["bits_per_quantized_weight"],
            "seconds": summary["seconds"],
            "peak_rss_bytes": summary["peak_rss_bytes"],
        }
        if files["wiki"] is not None:
            tokens = None if full else EVAL_TOKENS["wiki"]
            asked = EvaluateOptions(str(out), str(cell.model.folder), str(files["wiki"]), max_tokens=tokens)
            scored = evaluate(asked, lambda phase, *_: told(phase), lambda _: None)
            found["wiki"] = _figures(scored["report"])
    finally:
        shutil.rmtree(out, ignore_errors=True)
    cpu_seconds = time.process_time() - began
    return {
        "cell": cell.name,
        **found,
        "cpu_seconds": cpu_seconds,
        "options": given,
        "environment": environment(),
    }


def options_of(cell: Cell) -> Options:
    """What its result states: options beside model, bits, seed and texts."""
    given = {"group_size": cell.model.group_size, "num_samples": 64, "seq_len": 512, **cell.options}
    base = given.pop("bytes_of", None)
    if base is not None:
        given["budget_bits"] = bits_of(replace(cell, method=base))
    return given


def bits_of(cell: Cell) -> float:
    """Bits per quantized weight of a cell that is there."""
    if not cell.path.exists():
        raise SystemExit(f"{cell.name} is missing, whose bytes another cell is to take: compute it first")
    return float(json.loads(cell.path.read_text(encoding="utf-8"))["bits_per_quantized_weight"])


def _figures(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "nll": found["model"]["nll"],
        "original_nll": found["original"]["nll"],
        **{key: found[key] for key in ("nll_increase", "kl", "top1_agreement")},
        "tokens": found["text"]["tokens"],
    }


def save(path: Path, content: dict[str, Any]) -> None:
    """As a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def chosen(given: argparse.Namespace) -> list[Cell]:
    """By prefix of their names, bits and seeds."""
    return [
        cell
        for cell in cells()
        if (not given.cells or any(f"{cell.name}/".startswith(f"{prefix}/") for prefix in given.cells))
        and (not given.bits or cell.bits in given.bits)
        and (not given.seeds or cell.seed in given.seeds)
    ]


def run(wanted: list[Cell], minutes: float | None) -> None:
    """Compute those that are missing; begin none after ``minutes``."""
    files, began = texts(), time.monotonic()
    missing = [cell for cell in wanted if not cell.path.exists()]
    columns = (TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # The estimate is the mean of the cells done so far: slow ones are spread over the grid.
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=36_000) as bars:
        bar = bars.add_task("", total=len(missing))
        for cell in missing:
            if minutes is not None and time.monotonic() - began > 60 * minutes:
                break

            def told(phase: str, name: str = cell.name) -> None:
                bars.update(bar, description=f"{name} {phase}")

            told("")
            if not cell.path.exists():  # another process may have made it meanwhile
                save(cell.path, compute(cell, files, told))
            bars.advance(bar)
    left = sum(not cell.path.exists() for cell in wanted)
    print(f"{len(wanted) - left} of {len(wanted)} cells are there, {left} to go")


def restore(results: Path) -> None:
    """Take the cells that another machine reported, but those that are here, or were made otherwise."""
    found = {cell["cell"]: cell for cell in json.loads(results.read_text(encoding="utf-8"))["cells"]}
    restored = 0
    for cell in cells():
        if cell.name not in found or cell.path.exists():
            continue
        if why := made_otherwise(cell, found[cell.name]["options"]):
            print(f"{cell.name} is not restored: {why}")
        else:
            save(cell.path, found[cell.name])
            restored += 1
    print(f"{restored} of {len(found)} cells restored from {results.name}")


def made_otherwise(cell: Cell, options: Options) -> str | None:
    """Why a result with ``options`` is none of today's grid, or None. Bases come before their budgets."""
    base = cell.options.get("bytes_of")
    if base is not None and not replace(cell, method=base).path.exists():
        return f"{replace(cell, method=base).name} is missing, whose bytes it takes"
    today = options_of(cell)
    names = [name for name in {**today, **options} if today.get(name) != options.get(name)]
    said = (f"{name} is {options.get(name)} there and {today.get(name)} here" for name in names)
    return ", ".join(said) or None


def describe(wanted: list[Cell]) -> None:
    """The cells, and how much text they are scored on."""
    files = texts()
    for model in models():
        encoder = Encoder(model.folder, Tokenizer.from_folder(model.folder))
        for name, path in files.items():
            if path is not None and name != "calibration":
                passage = read_windows(read_documents(path, "--text"), encoder, None, 512)
                print(f"{model.name}: {passage.num_scored} tokens of {path.name}")
    for cell in wanted:
        print(f"{'done' if cell.path.exists() else 'to do':<6} {cell.name}")


def main() -> None:
    """Parse, compute, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cells", nargs="*", metavar="PREFIX", help="as in demo/gptq: whole parts of names")
    parser.add_argument("--bits", nargs="*", type=int)
    parser.add_argument("--seeds", nargs="*", type=int)
    parser.add_argument("--minutes", type=float, help="begin no cell after so many")
    parser.add_argument("--list", action="store_true", help="name the cells and compute nothing")
    parser.add_argument("--restore", type=Path, metavar="FILE", help="begin with the cells of a result")
    parser.add_argument("--report", action="store_true", help="only report")
    given = parser.parse_args()
    wanted = chosen(given)
    if given.restore is not None:
        restore(given.restore)
    if given.list:
        describe(wanted)
        return
    if not given.report:
        run(wanted, given.minutes)
    report([json.loads(cell.path.read_text(encoding="utf-8")) for cell in cells() if cell.path.exists()])


if __name__ == "__main__":
    main()
