"""Every flag, port, path and metric named in deploy/, the Dockerfile and the docs exists in the code."""

import inspect
import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from nybble.engine.client import EngineClient
from nybble.engine.records import ModelInfo
from nybble.server.admin import Admin
from nybble.server.app import build_app
from nybble.server.engine_metrics import EngineCollector
from nybble.server.job_metrics import JobCollector
from nybble.server.metrics import Metrics, VllmNames
from nybble.server.models import ModelTable
from nybble.server.settings import Settings, option_name

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
TEXTS = sorted(
    [p for p in DEPLOY.rglob("*") if p.is_file()]
    + [ROOT / "Dockerfile", ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
)
BOOTSTRAP_VARIABLES = {"NYBBLE_TORCH"}


def manifest(name: str) -> dict[str, Any]:
    """One of the Kubernetes manifests."""
    loaded = yaml.safe_load((DEPLOY / "kubernetes" / name).read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


@pytest.fixture(scope="session")
def pod() -> dict[str, Any]:
    """The pod of the Deployment."""
    spec = manifest("deployment.yaml")["spec"]["template"]["spec"]
    assert isinstance(spec, dict)
    return spec


@pytest.fixture(scope="session")
def container(pod: dict[str, Any]) -> dict[str, Any]:
    """Its one container."""
    (only,) = pod["containers"]
    assert isinstance(only, dict)
    return only


@pytest.fixture(scope="session")
def routes() -> set[str]:
    """The paths of the real application."""
    app: Any = build_app(
        SimpleNamespace(settings=Settings(), metrics=Metrics("demo")), Admin(None, None, None)
    )  # type: ignore[arg-type]
    while not hasattr(app, "routes"):
        app = app._app
    return {route.path for route in app.routes}


def serve_options() -> set[str]:
    """Every option of ``nybble serve``, and what switches one off."""
    names = {option_name(field) for field in Settings.model_fields}
    return names | {
        option_name(field, False) for field, i in Settings.model_fields.items() if i.annotation is bool
    }


def value_of(container: dict[str, Any], option: str) -> float:
    """The number that the manifest passes for an option."""
    return float(container["args"][container["args"].index(option) + 1])


def exposed_metrics() -> set[str]:
    """Every series that /metrics can show, from the real registry."""
    info = ModelInfo("llama", "float32", "cpu", "gptq", 4, 64, "k", 8, 8, [1], 1, 1, 1, 16, 1, 1.0)
    client = SimpleNamespace(
        stats=None, outstanding=0, ready=SimpleNamespace(is_set=lambda: True), restarts=0, info=info
    )
    metrics = Metrics("demo")
    model: Any = SimpleNamespace(client=client, name="demo", metrics=metrics.of("demo"))
    metrics.registry.register(EngineCollector(ModelTable([model]), {"start": 1.0}))
    jobs: Any = SimpleNamespace(all=list, num_ended=Counter(), num_gates=Counter())
    metrics.registry.register(JobCollector(jobs))
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
    families = [*metrics.registry.collect(), *VllmNames(metrics.registry).collect()]
    return {family.name + suffix for family in families for suffix in suffixes[family.type]}


def mentions(pattern: str) -> Iterator[tuple[str, str]]:
    """Every match of a pattern in the texts, with its place."""
    for path in TEXTS:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for match in re.finditer(pattern, line):
                yield f"{path.relative_to(ROOT)}:{number}", match.group(1)


def test_every_metric_exists() -> None:
    known = exposed_metrics()
    bare = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in known}
    named = [
        (place, name)
        for place, name in mentions(r"\b((?:nybble_|vllm:|process_)[a-z_]+[a-z])\b")
        if not place.startswith("Dockerfile")
    ]
    assert len(named) > 30
    assert [(place, name) for place, name in named if name not in known and name not in bare] == []
    in_queries = "".join(
        p.read_text() for p in [DEPLOY / "grafana/nybble.json", DEPLOY / "prometheus/alerts.yml"]
    )
    series = set(re.findall(r"\b(?:nybble|process)_[a-z_]+[a-z]\b", in_queries))
    assert series - known == set()


def test_every_label_in_a_query_exists() -> None:
    labels = set(re.findall(r"by \(([^)]*)\)", (DEPLOY / "grafana/nybble.json").read_text()))
    used = {name.strip() for group in labels for name in group.split(",")}
    assert used <= {"le", "model_name", "outcome", "status"}


def test_every_environment_variable_exists() -> None:
    known = {f"NYBBLE_{field.upper()}" for field in Settings.model_fields} | BOOTSTRAP_VARIABLES
    named = list(mentions(r"\b(NYBBLE_[A-Z_]+[A-Z])\b"))
    assert named
    assert [(place, name) for place, name in named if name not in known] == []


def test_every_argument_of_the_manifests_exists(container: dict[str, Any]) -> None:
    overlay = manifest("gpu/kustomization.yaml")["patches"][0]["patch"]
    added = [op["value"] for op in yaml.safe_load(overlay) if op["path"].endswith("/args/-")]
    arguments = [*container["args"], *added]
    assert arguments[0] == "serve"
    options = {a for a in arguments if str(a).startswith("--")}
    assert len(options) >= 4
    assert options - serve_options() == set()


def test_every_probe_is_a_route_that_needs_no_key(container: dict[str, Any], routes: set[str]) -> None:
    probes = [container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")]
    assert {probe["path"] for probe in probes} <= {"/health", "/ready"} & routes
    names = {port["name"] for port in container["ports"]}
    assert {probe["port"] for probe in probes} <= names
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert re.search(r"HEALTHCHECK(.|\n)*'/health'", dockerfile)


def test_every_path_exists(routes: set[str]) -> None:
    bare = {re.sub(r"/\{.*", "", route) for route in routes}
    named = list(
        mentions(r"(?<![\w.}/-])(/(?:v1/[a-z/]+|health|ready|metrics|version|tokenize|detokenize))\b")
    )
    assert named
    assert [(place, path) for place, path in named if path not in routes and path not in bare] == []


def test_one_port_everywhere(container: dict[str, Any]) -> None:
    default = Settings.model_fields["port"].default
    service = manifest("service.yaml")["spec"]["ports"][0]
    exposed = re.findall(r"^EXPOSE (\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    scrape = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["scrape_configs"][0]
    ports = {
        container["ports"][0]["containerPort"],
        int(value_of(container, "--port")),
        service["port"],
        *map(int, exposed),
        *(int(target.rpartition(":")[2]) for s in scrape["static_configs"] for target in s["targets"]),
    }
    assert ports == {default}
    assert service["targetPort"] == container["ports"][0]["name"]


def test_the_probes_agree_with_the_drain(pod: dict[str, Any], container: dict[str, Any]) -> None:
    delay, timeout = value_of(container, "--drain-delay"), value_of(container, "--drain-timeout")
    engine_stop = inspect.signature(EngineClient.stop).parameters["timeout"].default
    assert pod["terminationGracePeriodSeconds"] > delay + timeout + engine_stop
    ready = container["readinessProbe"]
    assert delay > ready["periodSeconds"] * ready["failureThreshold"] + ready["timeoutSeconds"]


def test_the_pod_is_locked_down(pod: dict[str, Any], container: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsNonRoot"]
    security = container["securityContext"]
    assert security["readOnlyRootFilesystem"]
    assert not security["allowPrivilegeEscalation"]
    assert security["capabilities"] == {"drop": ["ALL"]}
    user = re.search(r"^USER (\d+):(\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert user is not None
    assert int(user[1]) == pod["securityContext"]["runAsUser"] > 0


def test_what_is_written_lies_on_a_volume(pod: dict[str, Any], container: dict[str, Any]) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    (volume,) = re.findall(r"^VOLUME (\S+)$", dockerfile, re.MULTILINE)
    for name in ("HOME", "HF_HOME", "TRITON_CACHE_DIR", "NUMBA_CACHE_DIR"):
        (path,) = re.findall(rf"\b{name}=(\S+)", dockerfile)
        assert path.startswith(volume)
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert {volume, "/tmp"} <= set(mounts)
    assert set(mounts.values()) == {entry["name"] for entry in pod["volumes"]}


def test_the_names_of_the_manifests_meet(pod: dict[str, Any], container: dict[str, Any]) -> None:
    deployment, service, secret = (manifest(f"{n}.yaml") for n in ("deployment", "service", "secret"))
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == labels
    reference = container["env"][0]["valueFrom"]["secretKeyRef"]
    assert reference["name"] == secret["metadata"]["name"]
    assert reference["key"] in secret["stringData"]
    resources = manifest("kustomization.yaml")["resources"]
    assert sorted(resources) == sorted(
        p.name for p in (DEPLOY / "kubernetes").glob("*.yaml") if "kustom" not in p.name
    )


def test_the_image_starts_the_gateway_as_process_1() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert json.loads(re.findall(r"^ENTRYPOINT (.+)$", dockerfile, re.MULTILINE)[0]) == ["nybble"]
    assert json.loads(re.findall(r"^CMD (.+)$", dockerfile, re.MULTILINE)[0]) == ["serve"]
    stages = re.findall(r"^FROM \S+ AS (\w+)$", dockerfile, re.MULTILINE)
    assert stages == ["build", "cpu", "cuda", "final"]
    for variant, packages in (("cpu", ["libgomp1"]), ("cuda", ["gcc", "libc6-dev"])):
        stage = dockerfile.split(f" AS {variant}\n")[1].split("\nFROM ")[0]
        assert all(package in stage for package in packages)


def test_the_image_gets_the_whole_package() -> None:
    """.dockerignore lets through every folder that the wheel is built of."""
    lines = (ROOT / ".dockerignore").read_text().split()
    assert lines[0] == "*"
    assert {"!engine", "!kernels", "!server", "!pyproject.toml", "!README.md", "!LICENSE"} <= set(lines)


def test_the_dashboard_is_sound() -> None:
    board = json.loads((DEPLOY / "grafana/nybble.json").read_text())
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids)) > 10
    variables = {v["name"] for v in board["templating"]["list"]}
    for panel in board["panels"]:
        for target in panel["targets"]:
            used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval", "__range"}
            assert used <= variables, panel["title"]
            assert target["expr"].count("(") == target["expr"].count(")")
    boxes = [panel["gridPos"] for panel in board["panels"]]
    assert all(box["x"] + box["w"] <= 24 for box in boxes)


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "--syntax-only", "prometheus.yml"),
        ("check", "rules", "alerts.yml"),
        ("test", "rules", "alerts_test.yml"),
    ],
)
def test_promtool_agrees(arguments: tuple[str, ...]) -> None:
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool is not installed (Debian's package prometheus has it)")
    done = subprocess.run(
        [tool, *arguments], cwd=DEPLOY / "prometheus", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
