"""The levels of docs/architecture.md, checked on the source with ast and in child processes."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from source_tree import PARTS, ROOT, Module, modules, report
from waiting import answers, complete, until

LEVELS = (
    (r"kernels(\..+)?", 0),
    (r"engine\.(errors|records|config|messages|plan|model_files|hardware)", 1),
    (r"engine\.(tokenizer|slow_tokenizer|token_pieces|detokenizer|chat_template|chat_sandbox|documents)", 1),
    (r"engine\.quality_page", 1),
    (r"engine\.(sequence|block_manager|scheduler|memory|quantize\.(options|grid))|engine\.formats(\..+)?", 2),
    (r"engine\.model(\..+)?|engine\.(sampler|scoring|compare|quality)", 3),
    (r"engine\.(runner|step_model|tape_model|scorers|evaluate|check|tune)|engine\.quantize(\..+)?", 4),
    (r"engine\.(engine|build)", 5),
    (r"engine\.(worker|tasks|client)", 6),
    (r"server(\..+)?", 7),
)
TORCH_FREE = re.compile(
    LEVELS[1][0]
    + r"|engine\.(sequence|block_manager|scheduler|memory|client|quantize\.options)|server(\..+)?"
)
PROCESS_ENTRIES = {"engine.worker", "engine.tasks", "engine.client"}
GATEWAY_MAY_IMPORT = re.compile(
    r"engine\.(client|messages|records|config|errors|tokenizer|detokenizer|chat_template|model_files|hardware|"
    r"quantize\.options)"
)
HEAVY = ("torch", "transformers", "numba", "triton")


def level(module: Module) -> int | None:
    """Its level in the table; None for a package's own docstring and for a module the table lacks."""
    return next((number for pattern, number in LEVELS if re.fullmatch(pattern, module.name)), None)


def test_every_module_is_in_the_table() -> None:
    report(
        [m.at(1) + ": not in LEVELS" for m in modules().values() if level(m) is None and m.name != "engine"]
    )


def test_imports_go_downhill() -> None:
    bad = []
    for module in modules().values():
        for item in module.project_imports:
            target = modules().get(item.name)
            if target is None:
                bad.append(f"{module.at(item.line)}: imports nybble.{item.name}, which does not exist")
                continue
            here, there = level(module), level(target)
            if here is None or there is None or there < here or (here == there and _beside(module, target)):
                continue
            bad.append(f"{module.at(item.line)}: level {here} imports {item.name} (level {there})")
    report(bad)


def _beside(module: Module, target: Module) -> bool:
    """Within one level: kernels freely, elsewhere only beside each other."""
    return level(module) == 0 or module.package == target.package


def test_the_gateway_imports_only_the_clients_side() -> None:
    bad = []
    for module in modules().values():
        if module.name.split(".")[0] == "server":
            for item in module.project_imports:
                if not item.name.startswith("server") and not GATEWAY_MAY_IMPORT.fullmatch(item.name):
                    bad.append(f"{module.at(item.line)}: imports {item.name}")
    report(bad)


def test_no_import_cycles() -> None:
    graph = {
        m.name: {i.name for i in m.project_imports if i.name in modules() and i.name != m.name}
        for m in modules().values()
    }
    bad = []
    for start in graph:
        path, seen = [(start, iter(sorted(graph[start])))], {start}
        while path:
            following = next(path[-1][1], None)
            if following is None:
                path.pop()
            elif following == start:
                cycle = [name for name, _ in path]
                if min(cycle) == start:
                    bad.append(" -> ".join([*cycle, start]))
                break
            elif following not in seen:
                seen.add(following)
                path.append((following, iter(sorted(graph[following]))))
    report(bad)


def test_no_project_import_hides_in_a_function() -> None:
    report(
        [
            f"{m.at(i.line)}: {i.name}"
            for m in modules().values()
            if m.name not in PROCESS_ENTRIES
            for i in m.project_imports
            if i.in_function
        ]
    )


def test_imports_within_the_package_are_relative() -> None:
    bad = []
    for module in modules().values():
        for node in ast.walk(module.tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            bad += [
                f"{module.at(node.lineno)}: {name}"
                for name in names
                if name.split(".")[0] in ("nybble", *PARTS)
            ]
    report(bad)


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("triton", r"kernels\.triton(\..+)?"),
        ("numba", r"kernels\.cpu(\..+)?"),
        ("pydantic", r"server(\..+)?"),
        ("pydantic_settings", r"server(\..+)?"),
        ("fastapi", r"server(\..+)?"),
        ("starlette", r"server(\..+)?"),
        ("uvicorn", r"server(\..+)?"),
        ("typer", r"server(\..+)?"),
        ("msgspec", r"engine\.(messages|client|worker)"),
        ("torch", r"(?!engine\.client$)(kernels|engine)(\..+)?"),
    ],
)
def test_a_library_stays_in_its_place(library: str, allowed: str) -> None:
    report(
        [
            f"{m.at(i.line)}: {i.name}"
            for m in modules().values()
            if not re.fullmatch(allowed, m.name)
            for i in m.imports
            if i.name.split(".")[0] == library and not i.typing_only
        ]
    )


def test_torch_free_modules_are_torch_free(child_environment: dict[str, str]) -> None:
    names = [
        f"nybble.{name}"
        for name, module in modules().items()
        if level(module) == 1 or TORCH_FREE.fullmatch(name)
    ]
    assert len(names) > 10
    script = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        f"    heavy = [h for h in {HEAVY!r} if h in sys.modules]\n"
        "    if heavy: sys.exit(f'{name} brings in {heavy}')\n"
    )
    command = [sys.executable, "-c", script, *names]
    done = subprocess.run(command, env=child_environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_gateway_holds_no_heavy_library(
    child_environment: dict[str, str], free_port: int, tmp_path: Path
) -> None:
    """A gateway that has served a request never imported torch, transformers, numba or triton."""
    seen = tmp_path / "imports"
    runner = (
        "import sys\n"
        f"seen = open({str(seen)!r}, 'w', buffering=1)\n"
        "def audit(event, arguments):\n"
        "    if event == 'import': print(arguments[0], file=seen)\n"
        "sys.addaudithook(audit)\n"
        "from nybble.server.cli import main\n"
        "main()\n"
    )
    model = ROOT / "engine" / "demo" / "bf16"
    command = [sys.executable, "-c", runner, "serve", str(model), "--port", str(free_port)]
    url = f"http://127.0.0.1:{free_port}"
    log = tmp_path / "log"
    with log.open("wb") as out:
        gateway = subprocess.Popen(
            [*command, "--drain-delay", "0"], env=child_environment, cwd=tmp_path, stdout=out, stderr=out
        )
    try:
        until(lambda: gateway.poll() is not None or answers(f"{url}/ready"), 120)
        assert gateway.poll() is None, log.read_text()
        assert complete(url, 4)["usage"]["completion_tokens"] == 4
    finally:
        gateway.terminate()
        gateway.wait(60)
    imported = {name.partition(".")[0] for name in seen.read_text().split()}
    assert {"uvicorn", "fastapi"} <= imported, "the hook must see imports at all"
    assert imported.isdisjoint(HEAVY), sorted(imported.intersection(HEAVY))
