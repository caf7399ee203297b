"""The habits under the table in docs/architecture.md, checked on the source with ast."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from source_tree import everything, functions, modules, report


def is_compiled(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether numba or Triton compiles it: such a function takes flat arguments."""
    return any(re.search(r"\b(njit|jit|intrinsic)\b", ast.unparse(d)) for d in function.decorator_list)


def test_files_are_at_most_400_lines() -> None:
    report([f"{m.at(n)}" for m in everything() if (n := m.text.count("\n")) > 400])


def test_functions_are_at_most_60_lines() -> None:
    bad = []
    for module in everything():
        for function in functions(module):
            length = (function.end_lineno or 0) - function.lineno + 1
            if length > 60:
                bad.append(f"{module.at(function.lineno)}: {function.name} has {length} lines")
    report(bad)


def test_signatures_have_fewer_than_8_parameters() -> None:
    bad = []
    for module in everything():
        for function in functions(module):
            a = function.args
            named = [p for p in (*a.posonlyargs, *a.args, *a.kwonlyargs) if p.arg not in ("self", "cls")]
            if len(named) >= 8 and not is_compiled(function):
                bad.append(f"{module.at(function.lineno)}: {function.name} has {len(named)} parameters")
    report(bad)


def test_dialects_stay_in_formats() -> None:
    bad = []
    for module in modules().values():
        if not module.name.startswith("engine.formats"):
            for number, line in enumerate(module.text.splitlines(), 1):
                if word := re.search(r"\b(qweight|qzeros|desc_act)\b", line):
                    bad.append(f"{module.at(number)}: {word.group()}")
    report(bad)


def test_no_assert_in_the_gateway() -> None:
    report(
        [
            m.at(node.lineno)
            for m in modules().values()
            if m.name.startswith("server")
            for node in ast.walk(m.tree)
            if isinstance(node, ast.Assert)
        ]
    )


def test_the_environment_is_read_in_one_place() -> None:
    allowed = {"server.settings", "engine.hardware", "engine.client"}
    bad = []
    for module in modules().values():
        for node in ast.walk(module.tree):
            source = ast.unparse(node) if isinstance(node, ast.Attribute | ast.ImportFrom) else ""
            touches = re.fullmatch(
                r"os\.(environb?|getenvb?|putenv)|from os import .*(environ|getenv).*", source
            )
            if touches and module.name not in allowed:
                bad.append(f"{module.at(node.lineno)}: {source}")
    report(bad)


def test_nothing_in_a_checkpoint_can_run_code() -> None:
    bad = []
    for module in modules().values():
        for item in module.imports:
            if item.name.split(".")[0] in ("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"):
                bad.append(f"{module.at(item.line)}: import {item.name}")
        for name, call in module.calls():
            if name in ("eval", "exec", "compile", "torch.load", "__import__"):
                bad.append(f"{module.at(call.lineno)}: {name}(...)")
            for keyword in call.keywords:
                if keyword.arg == "trust_remote_code" and ast.unparse(keyword.value) != "False":
                    bad.append(f"{module.at(call.lineno)}: {name}(trust_remote_code=...)")
    report(bad)


# What a constant may be made with; a capitalized name is a record's constructor.
PURE_CALLS = re.compile(
    r"(re\.compile|struct\.Struct|frozenset|tuple|dict|range|len|type|float|int|max|min|sum|str|sorted|zip"
    r"|logging\.getLogger|namedtuple|partial|(typer\.)?(Option|Argument)|field|torch\.(iinfo|finfo)|(tl|gl)\.constexpr|np\.(dtype|u?int\d+|float\d+)|types\.\w+"
    r"|([\w.]+\.)?_?[A-Z]\w*(\.\w+)?|.+\.(join|format|split|items|values|keys|encode|replace))"
)


def test_importing_a_module_does_nothing() -> None:
    bad = []
    for module in modules().values():
        for node in module.tree.body:
            if problem := _effect(node):
                bad.append(f"{module.at(node.lineno)}: {problem}")
    report(bad)


def _effect(node: ast.stmt) -> str | None:
    """What a statement at module level does beyond naming things; None if nothing."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef() | ast.Import() | ast.ImportFrom():
            return None
        case ast.Expr(value=ast.Constant()):
            return None
        case ast.If(test=test):
            condition = ast.unparse(test)
            known = r"__name__ == '__main__'|(typing\.)?TYPE_CHECKING|sys\.(platform|version_info).*"
            return None if re.fullmatch(known, condition) else f"if {condition}"
        case (
            ast.Assign(targets=[ast.Name(id=name)], value=value)
            | ast.AnnAssign(target=ast.Name(id=name), value=value)
        ):
            return _value_effect(name, value)
        case ast.Assign(targets=[ast.Tuple(elts=names)], value=value):
            return next((effect for n in names if (effect := _value_effect(ast.unparse(n), value))), None)
    return ast.unparse(node).splitlines()[0]


def _value_effect(name: str, value: ast.expr | None) -> str | None:
    """What computing a module's constant does beyond making it."""
    if value is None:
        return None
    for node in _outside_lambdas(value):
        if isinstance(node, ast.Call) and not PURE_CALLS.fullmatch(ast.unparse(node.func)):
            return f"{name} calls {ast.unparse(node.func)}"
    mutable = isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp)
    if mutable and name != "__all__" and not name.isupper():
        return f"{name} is a mutable global"
    return None


def _outside_lambdas(node: ast.AST) -> Iterator[ast.AST]:
    """A node and what it computes at once."""
    yield node
    if not isinstance(node, ast.Lambda):
        for child in ast.iter_child_nodes(node):
            yield from _outside_lambdas(child)


def test_no_global_statements() -> None:
    report(
        [
            f"{m.at(node.lineno)}: global {', '.join(node.names)}"
            for m in modules().values()
            for node in ast.walk(m.tree)
            if isinstance(node, ast.Global)
        ]
    )


def test_configuration_is_frozen() -> None:
    bad, found = [], 0
    for module in modules().values():
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.ClassDef) or not (
                node.name.endswith(("Config", "Settings")) or module.name.split(".")[-1] in ("config", "plan")
            ):
                continue
            decorators = " ".join(ast.unparse(d) for d in node.decorator_list)
            settings = any("BaseSettings" in ast.unparse(base) for base in node.bases)
            if "dataclass" in decorators or settings:
                found += 1
                if "frozen=True" not in (ast.unparse(node) if settings else decorators):
                    bad.append(f"{module.at(node.lineno)}: {node.name}")
    report(bad)
    assert found


def _table(module_name: str, name: str) -> dict[str, str]:
    """A plug-in table of "module:name" strings."""
    module = importlib.import_module(f"nybble.{module_name}")
    table = getattr(module, name)
    assert isinstance(table, dict)
    return {str(key): str(value) for key, value in table.items()}


@pytest.mark.parametrize(
    ("home", "table", "marks"),
    [
        ("engine.formats.registry", "FORMATS", {"from_config", "read", "write", "config_entries"}),
        ("engine.quantize.methods", "METHODS", {"recipe"}),
        ("engine.quantize.methods", "METHODS", {"method"}),
        ("engine.quantize.transforms", "TRANSFORMS", {"prepare", "from_options"}),
    ],
)
def test_every_plug_in_is_in_its_table(home: str, table: str, marks: set[str]) -> None:
    """A plug-in is a class with its protocol's methods, or a function of this name; each has one line in one
    dict, and that resolves."""
    entries = _table(home, table)
    package = modules()[home].package
    for entry in entries.values():
        module_name, _, name = entry.partition(":")
        module = importlib.import_module(module_name, f"nybble.{package}")
        assert hasattr(module, name), entry
    bad = []
    for module in modules().values():
        if module.package != package:
            continue
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef) and not any("Protocol" in ast.unparse(b) for b in node.bases):
                names = {f.name for f in node.body if isinstance(f, ast.FunctionDef)}
            elif isinstance(node, ast.FunctionDef):
                names = {node.name}
            else:
                continue
            if marks <= names:
                entry = f"{module.name.rpartition('.')[2]}:{node.name}"
                if not any(value.endswith(entry) for value in entries.values()):
                    bad.append(f"{module.at(node.lineno)}: {node.name} is not in {table}")
    report(bad)


def test_the_scheduler_knows_no_prefill_phase() -> None:
    names = ("engine.scheduler", "engine.sequence", "engine.block_manager", "engine.plan")
    report([name for name in names if re.search(r"is_prefill|is_decode", modules()[name].text)])


# Written in pieces so that this file does not offend.
FORBIDDEN = {
    "an absolute path of one machine": r"(?<![\w.$}])/(work|root|home)/\w|/opt/(wh" + r"eels|py" + r"pi)",
    "a registry's host": r"py"
    + r"pi\.org|python"
    + r"hosted\.org|npm"
    + r"js\.|download\.py"
    + r"torch|deb\.deb"
    + r"ian",
    "a tool of the workplace": r"farm" + r"-bench|\.lib" + r"rary/",
    "a secret": r"(?i)\bBEGIN [A-Z ]*PRIVATE KEY|\bhf_[A-Za-z0-9]{30,}|\bsk-[A-Za-z0-9]{20,}",
}


def test_no_tracked_file_names_a_machine(tracked: list[Path], root: Path) -> None:
    bad = []
    for path in tracked:
        if path.suffix in (".safetensors", ".png") or path.stat().st_size > 1_000_000:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        for number, line in enumerate(text.splitlines(), 1):
            for what, pattern in FORBIDDEN.items():
                if re.search(pattern, line):
                    bad.append(f"{path.relative_to(root)}:{number}: {what}: {line.strip()[:80]}")
    report(bad)


# Tests of more than one module.
NO_TWIN = (
    "tests/test_*.py",
    "tests/integration/*.py",
    "tests/engine/test_random_workload.py",
    "tests/engine/test_parity.py",
    "tests/engine/quantize/test_gptqmodel.py",
    "tests/engine/quantize/test_quality.py",
    "tests/kernels/cpu/test_amx.py",
    "tests/kernels/cpu/test_cells.py",
    "tests/kernels/test_linear.py",
    "tests/server/test_bad_input.py",
    "tests/server/test_job_kills.py",
)


def test_tests_mirror_the_tree(root: Path) -> None:
    """tests/engine/test_x.py or test_x_more.py belongs to engine/x.py or the package engine/x."""
    bad = []
    for path in sorted((root / "tests").rglob("test_*.py")):
        relative = path.relative_to(root)
        if any(relative.match(pattern) for pattern in NO_TWIN):
            continue
        folder = root.joinpath(*relative.parts[1:-1])
        words = path.stem.removeprefix("test_").split("_")
        stems = ["_".join(words[:n]) for n in range(len(words), 0, -1)]
        if not any((folder / f"{stem}.py").exists() or (folder / stem).is_dir() for stem in stems):
            bad.append(f"{relative}: no {folder.relative_to(root)}/{stems[0]}.py")
    report(bad)
