"""What is tried, how it is chosen, what is written and read again: with a clock made up."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from nybble.kernels.triton import launch
from nybble.kernels.triton.launch import Launch, Machine, choose, use_tuned
from nybble.kernels.triton.tuning import (
    KINDS,
    SIZES,
    TOKENS,
    Contest,
    DoesNotRun,
    Problem,
    candidates,
    contests,
    hold,
    rehearsed,
    write,
)

H200 = Machine("NVIDIA H200", "sm_90", 132)
A, B, C = (Launch("mma", 8, bn, 4, 4, 1) for bn in (64, 128, 256))
SMALL, LARGE = Problem("w4", (128, 128), 1), Problem("w4", (4096, 4096), 1)


@pytest.fixture
def no_users_rules() -> Iterator[None]:
    yield
    launch._USERS.folder = None
    launch._file.cache_clear()
    launch.choose.cache_clear()


def contest(*tried: Launch) -> Contest:
    return Contest("w4", 8, None, (SMALL, LARGE), tried[0], tried)


def of(times: dict[Launch, tuple[float, float]]) -> launch.Any:
    calls = []

    def measure(problem: Problem, tried: Launch) -> float:
        calls.append((problem, tried))
        seconds = times[tried][problem == LARGE]
        if seconds < 0:
            raise DoesNotRun("too much shared memory")
        return seconds

    measure.calls = calls  # type: ignore[attr-defined]
    return measure


def test_the_least_geometric_mean_wins() -> None:
    """C saves more seconds, B more of each shape's time."""
    times = {A: (1e-6, 100e-6), B: (0.5e-6, 100e-6), C: (1e-6, 80e-6)}
    winner = hold(contest(A, B, C), of(times), lambda: None)
    assert winner.launch == B
    assert winner.gain == pytest.approx(2**0.5)


@pytest.mark.parametrize(("seconds", "winner"), [(0.985, A), (0.97, B)])
def test_noise_does_not_replace_the_default(seconds: float, winner: Launch) -> None:
    found = hold(contest(A, B), of({A: (1, 1), B: (seconds, seconds)}), lambda: None)
    assert found.launch == winner
    assert (found.gain == 1) == (winner == A)


def test_what_does_not_run_is_left_out_and_told() -> None:
    told: list[int] = []
    found = hold(contest(A, B, C), of({A: (3, 3), B: (2, -1), C: (2.5, 2.5)}), lambda: told.append(1))
    assert found.launch == C
    assert found.failed == ((B, "too much shared memory"),)
    assert len(told) == 6
    with pytest.raises(DoesNotRun):
        hold(contest(A, B), of({A: (-1, 1), B: (1, 1)}), lambda: None)


def test_a_hopeless_launch_is_measured_once() -> None:
    measure = of({A: (1, 1), B: (1.6, 0.1)})
    assert hold(contest(A, B), measure, lambda: None).launch == A
    assert measure.calls.count((LARGE, B)) == 0


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_kind_has_candidates_that_fit(architecture: str) -> None:
    machine = Machine("", architecture, 100)
    kinds = [kind for kind in KINDS if architecture != "gfx942" or not kind.endswith("24")]
    for found in contests(machine, kinds):
        assert found.candidates[0] == found.default
        assert len(set(found.candidates)) == len(found.candidates)
        assert len(found.candidates) > 1 or found.kind == "w4-outliers", "only one product takes overlays"
        for tried in found.candidates[1:]:
            if tried.BM:
                assert all(tried.fitted(p.shape[0]) == tried for p in found.problems)
                assert tried.BM in (64, 128) if found.bound in (None, 256, 2048) else found.bound <= tried.BM
        for problem in found.problems:  # one default for the whole class
            bits, sparsity = KINDS[found.kind]
            assert choose(machine, bits, problem.shape, problem.tokens, sparsity) == found.default


def test_2_4_is_refused_where_it_has_no_kernels() -> None:
    with pytest.raises(LookupError, match="w4-24: no launches for MI300X"):
        list(contests(Machine("MI300X", "gfx942", 304), ["w4-24"]))
    assert Launch("cusparselt") in candidates(H200, "2:4", None)


def tuned(folder: Path, *kinds: str) -> Path:
    winners = [hold(c, rehearsed(H200), lambda: None) for c in contests(H200, kinds)]
    return write(folder, H200, winners, {"rehearsal": True})


@pytest.mark.usefixtures("no_users_rules")
def test_rules_are_written_read_and_taken(tmp_path: Path) -> None:
    path = tuned(tmp_path, "w4", "w4-24")
    assert path.name == "nvidia-h200.json"
    before = choose(H200, 8, (4096, 4096), 8)
    use_tuned(tmp_path)
    expected = list(contests(H200, ["w4", "w4-24"]))  # defaults are now what was tuned
    wins = {(r["sparsity"], r.get("weights"), r["tokens"]): r for r in json.loads(path.read_text())["rules"]}
    assert len(wins) == len(expected) == 2 * len(SIZES) * len(TOKENS)
    for found in expected:
        rule = wins[KINDS[found.kind][1] or "none", found.weights, found.bound]
        assert found.default.kernel == rule["kernel"]
        assert rule.get("BN", 0) == found.default.BN
    overlay, plain = (choose(H200, 4, (4096, 4096), 3000, sparsity) for sparsity in ("overlay", None))
    assert overlay.kernel == "dense", "what was tuned without an overlay is not for one"
    assert plain == next(f.default for f in expected if f.bound is None and f.weights is not None)
    assert choose(H200, 8, (4096, 4096), 8) == before
    assert choose(Machine("NVIDIA H100", "sm_90", 132), 4, (4096, 4096), 8) == Launch("mma", 8, 128, 4, 4, 2)


@pytest.mark.parametrize("odd", [(1152, 896), (192, 896), (960, 576)])
@pytest.mark.usefixtures("no_users_rules")
def test_a_tuned_model_needs_at_most_16_kernels(odd: tuple[int, int], tmp_path: Path) -> None:
    """Also where tiles of 256 outputs do not divide a layer's: odd multiples of 128 or of 64."""
    by_default = {choose(H200, 4, odd, m) for m in range(1, 2050)}
    rules = json.loads(tuned(tmp_path, "w4").read_text())["rules"]
    use_tuned(tmp_path)
    shapes = ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (128256, 4096), odd)
    launches = {choose(H200, 4, shape, m) for shape in shapes for m in (*range(1, 600), 2048, 2049)}
    compiled = {(x.kernel, x.BM, x.BN, x.warps, x.stages) for x in launches}
    assert 6 <= len(compiled) <= 15  # and one that arranges inputs
    measured = {Launch(r["kernel"], *(r[name] for name in launch.CONSTANTS)) for r in rules}
    assert {choose(H200, 4, odd, m) for m in range(1, 2050)} <= measured | by_default


def test_another_kind_keeps_its_rules(tmp_path: Path) -> None:
    tuned(tmp_path, "w8")
    path = tuned(tmp_path, "w4")
    bits = [rule["bits"] for rule in json.loads(path.read_text())["rules"]]
    assert bits == [4] * 14 + [8] * 14
    assert json.loads(path.read_text())["environment"] == {"gpu": "NVIDIA H200", "rehearsal": True}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"rules": [{"tokens": 8, "kernel": "magic"}]}',
        '{"rules": [{"tokens": 8, "kernel": "mma", "BM": 8, "BN": 64, "warps": 4, "stages": 4}]}',
        '{"rules": [{"tokens": 8, "kernel": "mma", "BM": 8, "BN": -64, "warps": 4, "stages": 4, "programs": 1}]}',  # noqa: E501
        '{"rules": [{"kernel": "dense"}]}',
    ],
)
@pytest.mark.usefixtures("no_users_rules")
def test_a_broken_file_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "gpu.json").write_text(text)
    with pytest.raises(ValueError, match=r"gpu\.json: not a file of launch rules"):
        use_tuned(tmp_path)
