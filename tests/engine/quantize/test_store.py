"""Accumulators in memory and in files."""

import errno
from pathlib import Path

import pytest
import torch
from nybble.engine.errors import ConfigError
from nybble.engine.quantize import store
from nybble.engine.quantize.store import Store, held_bytes


def test_files_hold_what_is_added(tmp_path: Path) -> None:
    with Store(tmp_path) as files:
        a, b = files.zeros((3, 5)), files.zeros((1 << 19,), torch.float64)
        a += 2
        b[-1] = 7
        assert a.tolist() == [[2.0] * 5] * 3
        assert float(b.sum()) == 7
        sizes = sorted(path.stat().st_size for path in tmp_path.rglob("*.bin"))
        assert sizes == [60, 1 << 22]
    assert not list(tmp_path.iterdir())


def test_large_ones_go_to_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "available_memory", lambda: 4000)
    assert held_bytes(1000) == 1000
    assert held_bytes(1001) == 0
    folder = tmp_path / "new"
    with Store.for_bytes(folder, 1000):
        assert not folder.exists()
    with Store.for_bytes(folder, 1001) as files:
        files.zeros((4,))
        assert list(folder.rglob("*.bin"))


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, mode: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Store(tmp_path) as files:
        monkeypatch.setattr(Path, "open", full)
        with pytest.raises(ConfigError, match=r"no room for 4\.0 GB of gradients \(No space left"):
            files.zeros((10**9,))
