"""The streaming writer against the safetensors library."""

import json
import os
from pathlib import Path

import pytest
import torch
from nybble.engine.errors import ConfigError
from nybble.engine.formats.safetensors_files import SafetensorsFiles
from nybble.engine.quantize import writer
from nybble.engine.quantize.writer import CheckpointWriter
from safetensors.torch import load_file

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.uint8, torch.float64, torch.bool)


def tensors() -> dict[str, torch.Tensor]:
    """Of every dtype and of sizes that leave the next one unaligned, also empty, scalar and transposed."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for number in range(40):
        shape = [(3,), (5, 7), (), (0, 4), (8, 8), (1,)][number % 6]
        value = torch.randint(0, 2, shape, generator=generator).to(DTYPES[number % 7])
        found[f'name "{number}" ü'] = value.T if value.dim() == 2 else value
    return found


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    expected = tensors()
    with CheckpointWriter(tmp_path / "out", expected, overwrite=False) as target:
        for name, tensor in expected.items():
            target.add(name, tensor)
        assert not (tmp_path / "out").exists()
        target.commit()
    index = json.loads((tmp_path / "out" / writer.INDEX_NAME).read_text())
    assert index["weight_map"] == dict.fromkeys(sorted(expected), "model.safetensors")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "model.safetensors",
        writer.INDEX_NAME,
    ]
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with SafetensorsFiles(tmp_path / "out") as files:
        assert set(files) == set(expected)


def test_shards_have_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "MAX_SHARD_BYTES", 100)
    expected = tensors()
    with CheckpointWriter(tmp_path / "out", expected, overwrite=False) as target:
        for name, tensor in expected.items():
            target.add(name, tensor)
        target.add_json("config.json", {"a": 1})
        target.commit()
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    shards = sorted({*index["weight_map"].values()})
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    found = {}
    for shard in shards:
        part = load_file(tmp_path / "out" / shard)
        assert sum(t.nbytes for t in part.values()) <= 512  # one tensor may be larger than the limit
        assert all(index["weight_map"][name] == shard for name in part)
        found |= part
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_file_beside_the_shards_is_in_no_index(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", ["a", "b"], overwrite=False) as target:
        target.add("b", torch.arange(3), beside="more.safetensors")
        target.add("a", torch.zeros(5))
        target.add("c", torch.ones(3, dtype=torch.int16), beside="more.safetensors")
        target.commit()
        assert target.nbytes == 24 + 20 + 6
    index = json.loads((tmp_path / "out" / writer.INDEX_NAME).read_text())
    assert index == {"metadata": {"total_size": 20}, "weight_map": {"a": "model.safetensors"}}
    found = load_file(tmp_path / "out/more.safetensors")
    assert torch.equal(found["b"], torch.arange(3))
    assert torch.equal(found["c"], torch.ones(3, dtype=torch.int16))
    with SafetensorsFiles(tmp_path / "out") as files:
        assert set(files) == {"a"}
    with SafetensorsFiles(tmp_path / "out", ("more.safetensors",)) as files:
        assert set(files) == {"a", "b", "c"}


def test_without_commit_nothing_is_there(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", ["a"], overwrite=False) as target:
        target.add("a", torch.zeros(5))
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    with pytest.raises(ConfigError, match="is no folder"):
        CheckpointWriter(tmp_path / "file", [], overwrite=True)
    with (
        pytest.raises(ConfigError, match="cannot be written"),
        CheckpointWriter(tmp_path / "file" / "out", [], overwrite=False),
    ):
        pass


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with CheckpointWriter(out, ["a"], overwrite=False) as target:
        target.add("a", torch.zeros(5))
        out.mkdir()
        (out / "mine").touch()
        with pytest.raises(ConfigError, match="not empty"):
            target.commit()
    assert [path.name for path in out.iterdir()] == ["mine"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_process_of_the_same_number_left_is_in_no_way(tmp_path: Path) -> None:
    """In a container that is started again numbers are the same."""
    for kind in ("partial", "work"):
        (tmp_path / f".out.{os.getpid()}.{kind}").mkdir()
        (tmp_path / f".out.{os.getpid()}.{kind}" / "part-0").write_text("half")
    write_one(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def write_one(out: Path, overwrite: bool = False) -> None:
    with CheckpointWriter(out, ["a"], overwrite) as target:
        target.add("a", torch.zeros(5))
        target.commit()


def test_a_swap_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, rename = tmp_path / "out", Path.rename
    out.mkdir()
    (out / "mine").touch()

    def failing(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    monkeypatch.setattr(CheckpointWriter, "_name_shards", lambda self: ["model.safetensors"])
    with pytest.raises(ConfigError, match="cannot be written"):
        write_one(out, overwrite=True)
    assert [path.name for path in out.iterdir()] == ["mine"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("done", [False, True])
def test_killed_in_the_middle_of_the_swap(done: bool, tmp_path: Path) -> None:
    """Between two renames the old one has no name: it gets it back, unless the new one is there."""
    out, old = tmp_path / "out", tmp_path / ".out.99999999.old"  # above any process's number
    for folder in (old, *([out] if done else [])):
        folder.mkdir()
        (folder / f"of {folder.name}").touch()
    with pytest.raises(ConfigError, match="exists and is not empty"):
        write_one(out)
    if not done:
        assert [path.name for path in out.iterdir()] == [f"of {old.name}"]
    write_one(out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
