"""Headers that are truncated, lie or disagree with the file: an error with file and tensor, never a crash."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nybble.engine.errors import CheckpointError
from nybble.engine.formats.safetensors_files import SafetensorsFiles, read_header
from safetensors.torch import save_file


def write(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str = "F32", shape: tuple[int, ...] = (2,), begin: int = 0, end: int = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_a_good_file_and_its_tensors(tmp_path: Path) -> None:
    stored = {
        "a": torch.arange(6.0).view(2, 3),
        "empty": torch.zeros(0, 3),
        "half": torch.ones(5, dtype=torch.bfloat16),
        "scalar": torch.tensor(7, dtype=torch.int32),
    }
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with SafetensorsFiles(tmp_path) as files:
        assert set(files) == set(stored)
        assert str(files.tensors["a"]) == "F32 [2, 3]"
        for name, value in stored.items():
            assert torch.equal(files.get(name), value)
        kept = files.get("a")
    (tmp_path / "model.safetensors").write_bytes(b"")  # what was read does not depend on the file any more
    assert torch.equal(kept, stored["a"])


LIES = {
    "empty file": (b"", "truncated"),
    "short prefix": (b"\x01\x00", "truncated"),
    "header past the end": (struct.pack("<Q", 1 << 40) + b"{}", "truncated"),
    "negative length": (b"\xff" * 8 + b"{}", "truncated"),
    "not JSON": (struct.pack("<Q", 4) + b"{,,}", "JSON"),
    "not UTF-8": (struct.pack("<Q", 4) + b"{\xff\xff}", "JSON"),
    "a list": (struct.pack("<Q", 2) + b"[]", "list"),
    "nested deep": (struct.pack("<Q", 200_000) + b"[" * 200_000, "deep"),
}


@pytest.mark.parametrize("name", LIES)
def test_files_without_a_usable_header(tmp_path: Path, name: str) -> None:
    data, says = LIES[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=says) as error:
        read_header(path)
    assert str(path) in error.value.message


BAD_ENTRIES = {
    "size disagrees": (entry(shape=(3,)), "takes 12 bytes"),
    "unknown dtype": (entry("F33"), "unknown dtype"),
    "dtype of another size": (entry("F16"), "takes 4 bytes"),
    "negative dimension": (entry(shape=(-2, -1)), "not a list of sizes"),
    "fractional dimension": ({"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}, "not a list of sizes"),
    "boolean dimension": (
        {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]},
        "not a list of sizes",
    ),
    "huge dimensions": (entry(shape=(2**62, 2**62)), "takes"),
    "offset beyond int64": (entry(end=2**80), "not two offsets"),
    "negative offset": (entry(begin=-8, end=0), "not two offsets"),
    "reversed offsets": (entry(begin=8, end=0), "hold -8"),
    "past the end": (entry(shape=(4,), end=16), "truncated"),
    "a hole": (entry(shape=(1,), begin=4), "hole"),
    "data of nobody": (entry(shape=(1,), end=4), "belong to none"),
    "missing key": ({"dtype": "F32", "shape": [2]}, "must hold"),
    "an extra key": (entry() | {"pickle": "x"}, "must hold"),
    "no object": ("F32", "must hold"),
    "too many dimensions": (entry(shape=(1,) * 17), "not a list of sizes"),
}


@pytest.mark.parametrize("name", BAD_ENTRIES)
def test_entries_that_lie_are_named(tmp_path: Path, name: str) -> None:
    lie, says = BAD_ENTRIES[name]
    path = write(tmp_path / "model.safetensors", {"layer.weight": lie}, bytes(8))
    with pytest.raises(CheckpointError, match=says) as error:
        read_header(path)
    assert str(path) in error.value.message
    assert name == "data of nobody" or "layer.weight" in error.value.message


def test_overlaps_and_duplicate_names(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", {"a": entry(), "b": entry(begin=4, end=12)}, bytes(12))
    with pytest.raises(CheckpointError, match=r"'b'.*overlaps"):
        read_header(path)
    one = json.dumps(entry()).encode()
    write(path, b'{"a": ' + one + b', "a": ' + one + b"}", bytes(8))
    with pytest.raises(CheckpointError, match="'a' appears twice"):
        read_header(path)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_file_is_an_error_or_reads_as_before(tmp_path_factory: Any, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    save_file({"w": torch.arange(8.0), "b": torch.ones(2, dtype=torch.float16)}, path)
    raw = bytearray(path.read_bytes())
    if data.draw(st.booleans(), "cut"):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1), "length")]
    else:
        for _ in range(data.draw(st.integers(1, 4), "flips")):
            raw[data.draw(st.integers(0, len(raw) - 37), "where")] = data.draw(st.integers(0, 255), "byte")
    path.write_bytes(raw)
    try:
        header = read_header(path)
    except CheckpointError:
        return
    assert sum(info.nbytes for info in header.values()) + 8 + struct.unpack("<Q", raw[:8])[0] == len(raw)


def save_shards(folder: Path, weight_map: dict[str, str] | None = None) -> None:
    save_file({"a": torch.zeros(1)}, folder / "model-1.safetensors")
    save_file({"b": torch.ones(1)}, folder / "model-2.safetensors")
    index = {
        "metadata": {},
        "weight_map": weight_map or {"a": "model-1.safetensors", "b": "model-2.safetensors"},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards(tmp_path: Path) -> None:
    save_shards(tmp_path)
    with SafetensorsFiles(tmp_path) as files:
        assert list(files) == ["a", "b"]
        assert float(files.get("b")) == 1.0


@pytest.mark.parametrize(
    ("shard", "says"),
    [
        ("../secret.safetensors", "plain name"),
        ("/etc/secret.safetensors", "plain name"),
        ("sub/model.safetensors", "plain name"),
        ("..", "plain name"),
        ("sub\\model.safetensors", "plain name"),
        ("model.bin", "plain name"),
        ("", "plain name"),
        (7, "plain name"),
        ("model-3.safetensors", "missing shards"),
    ],
)
def test_an_index_may_only_name_files_of_its_folder(tmp_path: Path, shard: Any, says: str) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path.parent / "secret.safetensors")
    save_shards(tmp_path, {"a": shard, "b": "model-2.safetensors"})
    with pytest.raises(CheckpointError, match=says):
        SafetensorsFiles(tmp_path)


def test_an_index_that_names_what_a_shard_lacks(tmp_path: Path) -> None:
    save_shards(
        tmp_path, {"a": "model-1.safetensors", "c": "model-2.safetensors", "d": "model-2.safetensors"}
    )
    with pytest.raises(CheckpointError, match=r"model-2.safetensors: tensor 'c' is not there.*1 more"):
        SafetensorsFiles(tmp_path)


def test_the_index_decides_between_two_copies_and_without_it_they_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "y.safetensors")
    with pytest.raises(CheckpointError, match=r"2 safetensors files and no model.safetensors.index.json"):
        SafetensorsFiles(tmp_path)
    index = {"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with SafetensorsFiles(tmp_path) as files:
        assert float(files.get("a")) == 0.0


def test_a_single_file_of_any_name_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"put model\.safetensors there"):
        SafetensorsFiles(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is a pickle, which is never loaded"):
        SafetensorsFiles(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "gptq_model-4bit-128g.safetensors")
    with SafetensorsFiles(tmp_path) as files:
        assert list(files) == ["a"]


def test_what_only_the_library_refuses_is_a_checkpoint_error_too(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", {"__metadata__": {"format": 7}, "a": entry()}, bytes(8))
    with (
        SafetensorsFiles(tmp_path) as files,
        pytest.raises(CheckpointError, match="'a' cannot be read") as error,
    ):
        files.get("a")
    assert str(path) in error.value.message
