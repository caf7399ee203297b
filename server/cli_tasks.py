"""The commands ``check``, ``quantize``, ``eval`` and ``tune``: each shows what its task process reports."""

import inspect
import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass, fields
from threading import Timer
from typing import Annotated, Any, get_type_hints

import typer

from ..engine.client import child_environment
from ..engine.config import CpuActivations, CpuKernels, Device, DType
from ..engine.errors import ConfigError
from .cli_progress import Show, shown_progress
from .cli_quantize import Model, Quantize, Revision, Threads
from .cli_tune import Tune, describe
from .settings import bytes_of
from .task_process import STOP_SECONDS, task_command

WORST_MODULES = 12  # rows of the table of errors
GIVE_UP = 1  # exit code where the task failed through no fault of the user
INTERRUPTED = 130  # a task's exit code

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Say whether MODEL will load and how much memory it needs. Reads only headers and configuration."""

    model: Model
    revision: Revision = None
    device: Annotated[Device, typer.Option(help="Where it would run.")] = "auto"
    dtype: Annotated[DType, typer.Option(help="What it would be computed in.")] = "auto"
    max_model_len: Annotated[int | None, typer.Option(metavar="N", help="Longest request, in tokens.")] = None
    max_num_seqs: Annotated[int, typer.Option(metavar="N", help="Requests at a time.")] = 64
    kv_cache_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory for the KV cache, as in 2GiB.")
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluate:
    """Score MODEL on text: negative log-likelihood, perplexity, bits per byte; its distance to ORIGINAL.

    Exact by default. With --cpu-kernels, --cpu-activations or --lm-head-bits: as served with them; what they
    round is compared with exact numbers, or with ORIGINAL.
    """

    model: Model
    text: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Text split by <|endoftext|>, .jsonl with text or messages, or hf:owner/name/path. "
            "[default: built in]",
        ),
    ] = None
    against: Annotated[str | None, typer.Option(metavar="ORIGINAL", help="A model to compare with.")] = None
    json: Annotated[str | None, typer.Option(metavar="FILE", help="Write the comparison here.")] = None
    html: Annotated[str | None, typer.Option(metavar="FILE", help="The same as a page with plots.")] = None
    revision: Revision = None
    dtype: Annotated[DType, typer.Option(help="What to compute in.")] = "float32"
    max_len: Annotated[int | None, typer.Option(metavar="N", help="Context. [default: the model's]")] = None
    max_documents: Annotated[int | None, typer.Option(metavar="N", help="Score only the first ones.")] = None
    max_tokens: Annotated[int | None, typer.Option(metavar="N", help="Score only the first ones.")] = None
    cpu_kernels: Annotated[CpuKernels | None, typer.Option(help="As serve has it.")] = None
    cpu_activations: Annotated[CpuActivations | None, typer.Option(help="As serve has it.")] = None
    lm_head_bits: Annotated[int | None, typer.Option(metavar="4|8", help="As serve has it.")] = None
    num_threads: Threads = None


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command("check")(_command(Check, _check))
    app.command("quantize")(_command(Quantize, _quantize))
    app.command("eval")(_command(Evaluate, _evaluate))
    app.command("tune")(_command(Tune, _tune))


def _command(record: type[Any], action: Callable[[Any], None]) -> Callable[..., None]:
    """A typer command whose parameters are the fields of ``record``."""

    def command(**given: Any) -> None:
        action(record(**given))

    hints = get_type_hints(record, include_extras=True)
    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(record)
    ]
    command.__doc__ = record.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {}
    return command


def _check(given: Check) -> None:
    options = asdict(given) | {"kv_cache_memory": _bytes("--kv-cache-memory", given.kv_cache_memory)}
    report = run_task("check", options)
    for line in report["lines"]:
        typer.echo(line)
    if not report["loads"]:
        raise typer.Exit(2)


def _bytes(option: str, value: str | None) -> int | None:
    if value is None:
        return None
    try:
        return bytes_of(value)
    except ValueError as error:
        raise ConfigError(f"{option} {value!r}: {error}") from error


def _quantize(given: Quantize) -> None:
    try:
        summary = run_task("quantize", given.options())
    except KeyboardInterrupt:  # with --resume the task itself has said what is kept
        kept = "" if given.resume else "; nothing is kept (--resume keeps finished blocks)"
        typer.echo(f"nybble: interrupted{kept}", err=True)
        raise
    if summary["modules"]:
        _print_errors(summary["modules"])
    for name, reason in summary["dense"].items():
        typer.echo(f"dense: {name} ({reason})")
    for warning in summary["warnings"]:
        typer.echo(f"warning: {warning}")
    before, after = summary["bytes_before"], summary["bytes_after"]
    typer.echo(
        f"{summary['out']}: {_size(before)} -> {_size(after)} ({before / after:.2f} times smaller), "
        f"{summary['bits_per_weight']:.2f} bits per weight, all bytes counted"
    )
    if summary["bits_per_quantized_weight"] is not None:
        typer.echo(
            f"{len(summary['modules'])} modules quantized, {summary['bits_per_quantized_weight']:.2f} bits "
            f"per weight with scales, zeros and order; {len(summary['dense'])} left dense"
        )
    typer.echo(f"{summary['seconds']:.1f} s, peak memory {_size(summary['peak_rss_bytes'])}")
    if "report" in summary:
        _print_report(summary["report"])
        typer.echo(f"more in {summary['out']}/quality.html and quality.json")
        if not summary.get("gate", {}).get("passed", True):
            limit = summary["gate"]["max_nll_increase"]
            typer.echo(
                f"nybble: --max-nll-increase {limit:g}: not passed; OUT is kept, and says so", err=True
            )
            raise typer.Exit(GIVE_UP)
    else:
        typer.echo(f"what it cost: nybble eval {summary['out']} --against {given.model}")


def _print_report(report: Json) -> None:
    """The main figures."""
    text, model, original = report["text"], report["model"], report["original"]
    extent = "" if text["whole"] else "the first "
    typer.echo(f"{extent}{text['tokens']} tokens of {text['name']}, context {text['context']}:")
    typer.echo(f"  NLL per token   {model['nll']:.4f} nats from {original['nll']:.4f}")
    typer.echo(f"  change          {_change(report['nll_increase'], report['standard_error'])}")
    typer.echo(f"  perplexity      {_perplexity(model)} from {_perplexity(original)}")
    typer.echo(f"  KL per token    {report['kl']:.5f} nats from the original")
    typer.echo(f"  top-1 agreement {100 * report['top1_agreement']:.2f} %")
    prediction = report["prediction"]
    if prediction["computed"]:
        predicted, measured = (f"{prediction[key]:+.4f}" for key in ("predicted", "measured"))
        typer.echo(
            f"  predicted       {predicted} nats by gradients, where {measured} is "
            f"measured: on {prediction['tokens']} tokens alone"
        )
    else:
        typer.echo(f"  predicted       not computed: {prediction['reason']}")


def _change(rise: float, error: Json) -> str:
    """Of the NLL per token, with its standard error."""
    if error["nll_increase"] is None:
        return f"{rise:+.4f} nats (one window of text: its standard error is not known)"
    return f"{rise:+.4f} ± {error['nll_increase']:.4f} nats (standard error over {error['windows']} windows)"


def _perplexity(side: Json) -> str:
    return "above 1e300" if side["perplexity"] is None else f"{side['perplexity']:.4f}"


def _print_errors(modules: list[Json]) -> None:
    """The modules with the largest errors, of outputs where they are known."""
    # Imported here: the gateway, which this module is a part of, has no use for tables.
    from rich.console import Console
    from rich.table import Table

    key = "weight_error" if any(m["output_error"] is None for m in modules) else "output_error"
    worst = sorted(modules, key=lambda module: -float(module[key]))[:WORST_MODULES]
    table = Table("module", "output error", "weight error", "damping", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for module in worst:
        shown = [module["output_error"], module["weight_error"], module["damping"]]
        table.add_row(module["name"], *("-" if value is None else f"{value:.3g}" for value in shown))
    mean = sum(float(module[key]) for module in modules) / len(modules)
    title = f"largest of {len(modules)} errors" if len(modules) > len(worst) else "errors"
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{title}, relative and squared; mean {key.replace('_', ' ')} {mean:.3g}")
    console.print(table)


def _evaluate(given: Evaluate) -> None:
    found = run_task("evaluate", asdict(given))
    typer.echo(
        f"{found['num_tokens']} tokens"
        + ("" if found["num_bytes"] is None else f", {found['num_bytes']} bytes")
        + f" of {found['text']}, {found['dtype']}"
        + (f", {found['kernel']}" if "kernel" in found else "")
        + (f", output head in {found['lm_head_bits']} bits" if "lm_head_bits" in found else "")
    )
    compared = ""
    if "against" in found:
        its, original = found["nll_per_token"], found["against_nll_per_token"]
        compared = f" ({100 * (its / original - 1):+.3f} % from {original:.4f})" if original else ""
    typer.echo(f"NLL per token   {found['nll_per_token']:.4f} nats{compared}")
    if "against" in found:
        typer.echo(f"change          {_change(its - original, found['standard_error'])}")
    typer.echo(f"perplexity      {found['perplexity']:.4f}")
    if found["bits_per_byte"] is not None:
        typer.echo(f"bits per byte   {found['bits_per_byte']:.4f}")
    if "kl_per_token" in found:
        typer.echo(f"KL per token    {found['kl_per_token']:.5f} nats from {found['against']}")
        typer.echo(f"top-1 agreement {100 * found['top1_agreement']:.2f} %")
    if "report" in found:
        model, original = found["report"]["model"], found["report"]["original"]
        smaller = f"{original['bytes'] / model['bytes']:.2f} times smaller"
        bits = f"{model['bits_per_weight']:.2f} bits per weight, all bytes counted"
        typer.echo(f"size            {_size(model['bytes'])}, {smaller}; {bits}")


def _tune(given: Tune) -> None:
    for line in describe(run_task(*given.task())):
        typer.echo(line)


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.1f} {unit}" if unit != "B" else f"{num_bytes:.0f} B"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB"


def run_task(name: str, options: Json) -> Json:
    """Run the task ``name`` in a child process, its progress on stderr. Returns its result.

    Raises ConfigError for a user's error; exits with 1 where the task failed otherwise. An interrupt ends
    the child first.
    """
    environment = child_environment(options.get("num_threads"))
    with (
        shown_progress() as show,
        subprocess.Popen(
            task_command(name),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            preexec_fn=_deaf,
        ) as child,
        _ended(child, show),
    ):
        last: Json = {}
        for line in _talk(child, options):
            last = json.loads(line)
            show(last)
    if last.get("event") == "result":
        return last
    if last.get("event") == "error":
        if last["user_error"]:
            raise ConfigError(last["message"])
        typer.echo(f"nybble: {name} failed: {last['message']}", err=True)
    elif (code := child.wait()) == INTERRUPTED:  # it alone: this process may have been started deaf to it
        raise KeyboardInterrupt
    else:
        typer.echo(f"nybble: {name} ended without a word (exit code {code})", err=True)
    raise typer.Exit(GIVE_UP)


def _deaf() -> None:
    """In the child, until its task begins: a terminal's interrupt would end its imports with a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _talk(child: "subprocess.Popen[str]", options: Json) -> Iterator[str]:
    """Send the options, then yield the child's lines."""
    if child.stdin is None or child.stdout is None:
        raise RuntimeError("the child has no pipes")
    try:
        child.stdin.write(json.dumps(options))
        child.stdin.close()
    except BrokenPipeError:
        pass  # it died at once; what it said, or its exit code, tells more
    yield from child.stdout


@contextmanager
def _ended(child: "subprocess.Popen[str]", show: Show) -> Iterator[None]:
    """Leaving it with an error or an interrupt ends the child: politely, then not. Shows its last words."""
    try:
        yield
    except BaseException as error:
        child.terminate()
        by_force = Timer(STOP_SECONDS, child.kill)
        by_force.start()
        try:
            for line in child.stdout or ():  # a full pipe would keep it from ending
                if isinstance(error, KeyboardInterrupt):
                    with suppress(ValueError):  # the interrupt, or the kill, may have cut the line
                        show(json.loads(line))
            child.wait()
        finally:
            by_force.cancel()
        raise
