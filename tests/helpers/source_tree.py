"""The package's source as tests see it: modules, their syntax trees and their imports."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("server", "engine", "kernels")
OUTSIDE = ("tests", "scripts", "benchmarks")


@dataclass(frozen=True)
class Import:
    """One import statement of a module: the absolute name it binds, and where it stands."""

    name: str  # "torch.nn", or "nybble.engine.errors"
    line: int
    in_function: bool
    typing_only: bool


class Module:
    """One source file of the package."""

    def __init__(self, path: Path) -> None:
        self.path = path
        parts = path.relative_to(ROOT).with_suffix("").parts
        self.is_package = parts[-1] == "__init__"
        self.name = ".".join(parts[:-1] if self.is_package else parts)
        self.text = path.read_text(encoding="utf-8")
        self.tree = ast.parse(self.text, str(path))

    @property
    def package(self) -> str:
        """The name of the package it lives in ("engine" for engine.config)."""
        return self.name if self.is_package else self.name.rpartition(".")[0]

    @cached_property
    def imports(self) -> list[Import]:
        """Every import, at any depth."""
        return list(self._walk(self.tree, False, False))

    @cached_property
    def project_imports(self) -> list[Import]:
        """Imports of our own modules, as names below nybble ("engine.errors")."""
        ours = []
        for item in self.imports:
            head, _, rest = item.name.partition(".")
            if head == "nybble" and rest != "__version__":
                target = rest if rest in modules() else rest.rpartition(".")[0]
                ours.append(Import(target, item.line, item.in_function, item.typing_only))
        return ours

    def _walk(self, node: ast.AST, in_function: bool, typing_only: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inside = in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typing = typing_only or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, child.lineno, in_function, typing_only)
            elif isinstance(child, ast.ImportFrom):
                base = self._absolute(child)
                for alias in child.names:
                    yield Import(f"{base}.{alias.name}", child.lineno, in_function, typing_only)
            else:
                yield from self._walk(child, inside, typing)

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        anchor = ("nybble." + self.package).split(".")
        anchor = anchor[: len(anchor) - node.level + 1]
        return ".".join([*anchor, node.module] if node.module else anchor)

    def calls(self) -> Iterator[tuple[str, ast.Call]]:
        """Every call with its function's source ("torch.load")."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call):
                yield ast.unparse(node.func), node

    def at(self, line: int) -> str:
        """A place, for the list of offenders."""
        return f"{self.path.relative_to(ROOT)}:{line}"


@lru_cache
def modules() -> dict[str, Module]:
    """Every module of server/, engine/ and kernels/ by its name below nybble."""
    paths = sorted(path for part in PARTS for path in (ROOT / part).rglob("*.py"))
    return {module.name: module for module in map(Module, paths)}


@lru_cache
def everything() -> list[Module]:
    """The package and the Python around it (tests, scripts, benchmarks)."""
    around = sorted(path for part in OUTSIDE for path in (ROOT / part).rglob("*.py"))
    return [*modules().values(), *map(Module, around)]


def report(offenders: list[str]) -> None:
    """Fail with the sorted list, one a line."""
    if offenders:
        pytest.fail("\n".join(sorted(offenders)), pytrace=False)


def functions(module: Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method of a module."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
