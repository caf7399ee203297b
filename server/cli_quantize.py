"""The options of ``nybble quantize``."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..engine.errors import ConfigError

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, or a hub id (owner/name).")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Threads = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="CPU threads. [default: physical cores]")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantize:
    """Compress MODEL into the new folder OUT, a checkpoint that other engines read too."""

    model: Model
    out: Annotated[str, typer.Argument(metavar="OUT", help="The folder to write.")]
    method: Annotated[
        Literal["rtn", "gptq", "awq", "yaqa", "requant", "gwq", "sparse24"],
        typer.Option(help="How weights are rounded (docs/quantizers.md)."),
    ] = "gptq"
    base: Annotated[
        Literal["rtn", "gptq", "awq", "yaqa"], typer.Option(help="What requant and gwq build on.")
    ] = "gptq"
    transform: Annotated[
        Literal["none", "awq", "smoothquant"] | None,
        typer.Option(help="Move scales into the module before. [default: the method's own]"),
    ] = None
    revision: Revision = None
    bits: Annotated[
        int, typer.Option(metavar="2|3|4|8", help="Bits of a weight; 16 with sparse24: only prune.")
    ] = 4
    group_size: Annotated[int, typer.Option(metavar="N", help="Inputs per scale; -1: a whole row.")] = 128
    symmetric: Annotated[
        bool, typer.Option("--sym/--asym", help="The zero point in the middle, or one for each group.")
    ] = True
    actorder: Annotated[
        Literal["none", "group", "gar"],
        typer.Option(help="Important inputs first: over all (group; stored g_idx), or within groups (gar)."),
    ] = "none"
    static_groups: Annotated[
        bool, typer.Option("--static-groups", help="Groups of the original order, fitted first; no g_idx.")
    ] = False
    true_sequential: Annotated[
        bool, typer.Option(help="Within a block, quantize on inputs that passed what was quantized.")
    ] = True
    checkpoint_format: Annotated[
        Literal["gptq", "gptq_v2", "awq", "compressed-tensors"] | None,
        typer.Option(help="[default: gptq for --sym, gptq_v2 for --asym]"),
    ] = None
    lm_head_bits: Annotated[
        int | None,
        typer.Option(metavar="2|3|4|8", help="Round the output head too. [default: it stays as it is]"),
    ] = None
    dynamic: Annotated[
        str | None,
        typer.Option(metavar="JSON|FILE", help='As in {"pattern": {"bits": 8}, "-:left_out": {}}.'),
    ] = None
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Text split by <|endoftext|>, .jsonl with text or messages, or hf:owner/name/path. "
            "[default: built in]",
        ),
    ] = None
    num_samples: Annotated[int, typer.Option(metavar="N", help="Calibration sequences.")] = 128
    seq_len: Annotated[int, typer.Option(metavar="N", help="Their longest length, in tokens.")] = 2048
    damping: Annotated[float, typer.Option(help="Share of the Hessian's mean diagonal.")] = 0.01
    mse: Annotated[float, typer.Option(help="Search ranges by |error|^MSE, 2.4 is usual; 0: off.")] = 0.0
    awq_steps: Annotated[int, typer.Option(metavar="N", help="Points of AWQ's search.")] = 20
    smooth_alpha: Annotated[float, typer.Option(help="SmoothQuant's share for the weights.")] = 0.5
    prune: Annotated[
        Literal["magnitude", "wanda", "sparsegpt"], typer.Option(help="sparse24: how weights are chosen.")
    ] = "sparsegpt"
    joint: Annotated[bool, typer.Option(help="sparse24: let rounding repay pruning.")] = True
    transposable: Annotated[
        bool, typer.Option("--transposable", help="sparse24: 2 of 4 along the outputs too.")
    ] = False
    shrinkage: Annotated[float, typer.Option(help="yaqa: share of the identity in the curvature.")] = 0.1
    outlier_percent: Annotated[
        float | None, typer.Option(help="Weights that stay exact. [default: requant 0.25, gwq 1]")
    ] = None
    significant_percent: Annotated[
        float | None, typer.Option(help="requant: weights put back for what they cost. [default: 0.25]")
    ] = None
    budget_bits: Annotated[
        float | None, typer.Option(help="requant: bits per weight in all; chooses bits, groups, outliers.")
    ] = None
    detach_steps: Annotated[int, typer.Option(metavar="N", help="requant: in so many steps.")] = 2
    pqi_intervals: Annotated[int, typer.Option(metavar="N", help="requant: of the path integral.")] = 32
    gradient_samples: Annotated[
        int, typer.Option(metavar="N", help="Sequences that requant and gwq differentiate.")
    ] = 100
    seed: Annotated[int, typer.Option(metavar="N", help="Order of the calibration documents.")] = 0
    report: Annotated[bool, typer.Option(help="Measure what quantizing costs, on held-out text.")] = True
    eval_text: Annotated[
        str | None, typer.Option(metavar="FILE", help="That text, as --calibration. [default: built in]")
    ] = None
    eval_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Its first N tokens. [default: all up to 100 M parameters, else 64 k]"
        ),
    ] = None
    predict: Annotated[
        bool | None,
        typer.Option(help="Report the loss change that gradients predict. [default: up to 100 M parameters]"),
    ] = None
    max_nll_increase: Annotated[
        float | None,
        typer.Option(
            metavar="NATS",
            help="A gate: where the NLL per token rises by more, OUT says so, and servers do not load it.",
        ),
    ] = None
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep finished blocks when interrupted, and go on from them.")
    ] = False
    num_threads: Threads = None

    def options(self) -> dict[str, Any]:
        """For the task. ConfigError where ``dynamic`` is neither JSON nor a file of it."""
        return asdict(self) | {"dynamic": _parsed("--dynamic", self.dynamic)}


def _parsed(option: str, given: str | None) -> Any:
    if given is None:
        return None
    try:
        text = given if given.lstrip().startswith("{") else Path(given).expanduser().read_text()
        found = json.loads(text)
    except OSError as error:
        raise ConfigError(f"{option} {given[:100]}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"{option} {given[:100]}: is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{option} {given[:100]}: expected an object of patterns")
    return found
