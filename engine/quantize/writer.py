"""Writing a checkpoint as it comes: safetensors shards in a temporary folder that becomes the real one.

Layout of a shard: 8 bytes little-endian length, the JSON header padded with spaces, the tensors without gaps.
"""

import glob
import json
import os
import re
import shutil
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch
from torch import Tensor

from ..errors import ConfigError

MAX_SHARD_BYTES = 5_000_000_000
INDEX_NAME = "model.safetensors.index.json"
_ENTRY_BYTES = 160  # bound of one header entry beside the tensor's name: dtype, shape, two offsets
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class _Shard:
    """One file. The header's room is reserved first, since what it says is known only at the end."""

    def __init__(self, path: Path, header_bytes: int) -> None:
        self.path = path
        self._room = -(-header_bytes // 8) * 8
        self._file: BinaryIO = path.open("wb")
        self._file.seek(8 + self._room)
        self._header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._unaligned: list[tuple[str, Tensor]] = []
        self.nbytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Append; a tensor that would leave the next one unaligned waits for the end."""
        if tensor.nbytes % 8:
            self._unaligned.append((name, tensor))
        else:
            self._append(name, tensor)

    def _append(self, name: str, tensor: Tensor) -> None:
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        self._file.write(data.numpy().data)
        self._header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self.nbytes, self.nbytes + tensor.nbytes],
        }
        self.nbytes += tensor.nbytes

    def close(self) -> None:
        """Write what waits, widest first, then the header, and flush to the disk."""
        for name, tensor in sorted(self._unaligned, key=lambda item: -item[1].element_size()):
            self._append(name, tensor)
        header = json.dumps(self._header, separators=(",", ":")).encode()
        assert len(header) <= self._room
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._room) + header.ljust(self._room))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def discard(self) -> None:
        """Close without a header."""
        self._file.close()


class CheckpointWriter:
    """A context manager: ``add`` tensors, ``add_file`` and ``add_json``, then ``commit``.

    Until ``commit`` everything lies in a hidden folder beside ``out``, which leaving the context removes.
    Holds one tensor at a time (and those of odd sizes of the current shard). Errors: ConfigError.
    """

    def __init__(self, out: Path, tensor_names: Iterable[str], overwrite: bool) -> None:
        """``tensor_names``: all that may come, for the size of the headers."""
        self.out = out
        self._overwrite = overwrite
        refuse_existing(out, overwrite)
        self._header_bytes = 64 + sum(len(json.dumps(name)) + _ENTRY_BYTES for name in tensor_names)
        self._folder = out.parent / f".{out.name}.{os.getpid()}.partial"
        self._shards: list[_Shard] = []
        self._shard_of: dict[str, int] = {}
        self._beside: dict[str, _Shard] = {}
        self._finished = False

    def __enter__(self) -> Self:
        with self._writing():
            remove_leftovers(self.out)
            refuse_existing(self.out, self._overwrite)  # again: the old one may be back
            self._folder.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for shard in (*self._shards, *self._beside.values()):
            shard.discard()
        shutil.rmtree(self._folder, ignore_errors=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(f"OUT {self.out}: cannot be written ({error.strerror or error})") from error

    @property
    def nbytes(self) -> int:
        """Bytes of tensors; of all of them once finished."""
        return sum(shard.nbytes for shard in (*self._shards, *self._beside.values()))

    def add(self, name: str, tensor: Tensor, beside: str | None = None) -> None:
        """Append one tensor of the checkpoint; ``beside``: to a file of this name, which no index lists."""
        assert name not in self._shard_of
        if beside is not None:
            with self._writing():
                if beside not in self._beside:
                    self._beside[beside] = _Shard(self._folder / beside, self._header_bytes)
                self._beside[beside].add(name, tensor)
            return
        with self._writing():
            if not self._shards or self._shards[-1].nbytes + tensor.nbytes > MAX_SHARD_BYTES:
                if self._shards:
                    self._shards[-1].close()
                path = self._folder / f"part-{len(self._shards)}"
                self._shards.append(_Shard(path, self._header_bytes))
            self._shards[-1].add(name, tensor)
        self._shard_of[name] = len(self._shards) - 1

    def add_file(self, source: Path) -> None:
        """Copy a file beside the weights."""
        with self._writing():
            shutil.copyfile(source, self._folder / source.name)

    def add_text(self, name: str, content: str) -> None:
        """Write a text file beside the weights, or write it anew."""
        with self._writing():
            (self._folder / name).write_text(content, encoding="utf-8")

    def add_json(self, name: str, content: object) -> None:
        """Write a JSON file beside the weights, or write it anew."""
        self.add_text(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def finish(self) -> Path:
        """Close the shards and write their index: what is in the folder that this returns can be loaded."""
        assert not self._finished
        with self._writing():
            if self._shards:
                self._shards[-1].close()
            for shard in self._beside.values():
                shard.close()
            names = self._name_shards()
            weight_map = {name: names[shard] for name, shard in sorted(self._shard_of.items())}
            index = {"metadata": {"total_size": sum(shard.nbytes for shard in self._shards)}}
            self.add_json(INDEX_NAME, index | {"weight_map": weight_map})
        self._finished = True
        return self._folder

    def commit(self) -> None:
        """Finish, and move the folder to its place, the old one (with ``overwrite``) away."""
        if not self._finished:
            self.finish()
        with self._writing():
            refuse_existing(self.out, self._overwrite)
            old = self._folder.with_suffix(".old")
            if self.out.exists():
                self.out.rename(old)
            try:
                self._folder.rename(self.out)
            except OSError:
                if old.exists():
                    old.rename(self.out)
                raise
            shutil.rmtree(old, ignore_errors=True)

    def _name_shards(self) -> list[str]:
        total = len(self._shards)
        if total == 1:
            names = ["model.safetensors"]
        else:
            names = [f"model-{number + 1:05d}-of-{total:05d}.safetensors" for number in range(total)]
        for shard, name in zip(self._shards, names, strict=True):
            shard.path.rename(self._folder / name)
        return names


def remove_leftovers(out: Path) -> None:
    """Hidden folders that processes which are no more left beside ``out``: they were killed.

    One with this process's number is not its own, which is yet to be made: in a container numbers come again.
    The old checkpoint of one that was killed while it took its place is put back.
    """
    for path in out.parent.glob(f".{glob.escape(out.name)}.*"):
        match = re.fullmatch(r"\.(\d+)\.(partial|work|old)", path.name[len(out.name) + 1 :])
        if match is None or (int(match[1]) != os.getpid() and Path("/proc", match[1]).exists()):
            continue
        if match[2] == "old" and not (out.is_dir() and any(out.iterdir())):
            path.rename(out)
        else:
            shutil.rmtree(path, ignore_errors=True)


def refuse_existing(out: Path, overwrite: bool) -> None:
    """ConfigError where something is there that may not be replaced."""
    if out.is_dir():
        if any(out.iterdir()) and not overwrite:
            raise ConfigError(f"OUT {out}: exists and is not empty; choose another folder or add --overwrite")
    elif out.exists() or out.is_symlink():
        raise ConfigError(f"OUT {out}: exists and is no folder; choose another name")
