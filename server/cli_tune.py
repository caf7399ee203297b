"""The options of ``nybble tune``, and its result in words."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import typer


@dataclass(frozen=True, slots=True, kw_only=True)
class Tune:
    """Measure which kernel configurations are fastest on this GPU, for every server that starts from now on.

    With --warm: compile MODEL's kernels instead, so that its servers start without.
    """

    warm: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Only compile what serving MODEL launches.")
    ] = None
    kind: Annotated[
        list[str] | None,
        typer.Option(
            help="Weights to tune for: w2, w3, w4, w8, w4-outliers, w4-24, 16-24; repeatable. [default: w4]"
        ),
    ] = None
    dtype: Annotated[Literal["bfloat16", "float16"], typer.Option(help="Of activations.")] = "bfloat16"
    out: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Where to write. [default: tuned in the cache, read by serve]"),
    ] = None
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Without a GPU, with made-up times: writes rehearsal.json.")
    ] = False

    def task(self) -> tuple[str, dict[str, Any]]:
        """The task and its options."""
        if self.warm is not None:
            return "warm", {"model": self.warm, "dtype": self.dtype}
        kinds = self.kind or ["w4"]
        return "tune", {"kinds": kinds, "dtype": self.dtype, "out": self.out, "rehearse": self.rehearse}


def describe(found: dict[str, Any]) -> Iterator[str]:
    """Lines for people, of either task's result."""
    if "kernels" in found:
        yield f"{found['kernels']} kernels in {found['folder']}, {found['seconds']:.1f} s"
        return
    rules = found["rules"]
    better = [rule["gain"] for rule in rules if rule["gain"] > 1]
    yield f"{found['gpu']}: {len(rules)} rules, {len(better)} beat the default" + (
        f", the best by {max(better):.2f} times" if better else ""
    )
    yield f"{found['path']}, {found['seconds']:.0f} s"
    yield "serve reads it from its next start on" if found["read"] else "serve does not read this folder"
