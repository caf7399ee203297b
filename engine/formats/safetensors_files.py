"""A folder of safetensors: headers read and checked without their data, tensors read one at a time.

Layout (safetensors' own specification): 8 bytes little-endian header length, a JSON header mapping each
name to dtype, shape and data_offsets, then the data. Nothing here unpickles or executes anything.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from ..model_files import parse_json, read_json

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_INDEX_BYTES = 64 << 20
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as a header states it; ``begin`` and ``end`` are byte offsets into the file's data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    path: Path

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return self.end - self.begin

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of the safetensors file ``path``, every offset checked against the file's size.

    CheckpointError names file and tensor: truncated or lying header, unknown dtype, size and shape that
    disagree, overlaps, holes, data past the end, duplicate names.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > size - 8:
                raise CheckpointError(
                    f"{path}: truncated: {size} bytes, but its header alone should have {length}; "
                    "download it again"
                )
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path}: header of {length} bytes; the format allows {MAX_HEADER_BYTES}"
                )
            header = parse_json(file.read(length), f"{path}: header")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    header.pop("__metadata__", None)
    tensors = [_tensor(path, name, entry) for name, entry in header.items()]
    _check_layout(path, tensors, size - 8 - length)
    return {tensor.name: tensor for tensor in tensors}


def _tensor(path: Path, name: str, entry: Any) -> TensorInfo:
    where = f"{path}: tensor {name[:200]!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: its header entry must hold dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise CheckpointError(f"{where}: unknown dtype {str(dtype)[:50]!r}")
    if not isinstance(shape, list) or len(shape) > 16 or not all(map(_is_size, shape)):
        raise CheckpointError(f"{where}: shape {str(shape)[:100]} is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise CheckpointError(f"{where}: data_offsets {str(offsets)[:100]} are not two offsets")
    begin, end = offsets
    bits = math.prod(shape) * _BITS[dtype]
    if (end - begin) * 8 != bits:
        raise CheckpointError(
            f"{where}: {dtype} {shape} takes {-(-bits // 8)} bytes, but its data_offsets hold {end - begin}"
        )
    return TensorInfo(name, dtype, tuple(shape), begin, end, path)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _check_layout(path: Path, tensors: list[TensorInfo], data_bytes: int) -> None:
    position = 0
    for tensor in sorted(tensors, key=lambda t: (t.begin, t.end)):
        if tensor.begin != position:
            what = "overlaps the one before it" if tensor.begin < position else "leaves a hole before it"
            raise CheckpointError(
                f"{path}: tensor {tensor.name!r} at offset {tensor.begin} {what} (expected {position})"
            )
        position = tensor.end
        if position > data_bytes:
            raise CheckpointError(
                f"{path}: tensor {tensor.name!r} ends at byte {position} of the data, but the file holds "
                f"{data_bytes}; it is truncated, download it again"
            )
    if position != data_bytes:
        raise CheckpointError(f"{path}: {data_bytes - position} bytes after the last tensor belong to none")


def find_shards(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The folder's safetensors files and, where it has an index, the file that holds each tensor.

    CheckpointError: no safetensors, an unsafe or missing shard, or files that only an index could order.
    """
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    preferred = folder / "model.safetensors.index.json"
    if preferred in indexes or len(indexes) == 1:
        return _read_index(preferred if preferred in indexes else indexes[0])
    single = folder / "model.safetensors"
    files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if len(files) > 1:
        raise CheckpointError(
            f"{folder}: {len(files)} safetensors files and no model.safetensors.index.json says which "
            "belong together; keep one, or add the index"
        )
    if not files:
        pickles = [path.name for pattern in _PICKLES for path in folder.glob(pattern)]
        remedy = "put model.safetensors there"
        if pickles:
            remedy = f"{pickles[0]} is a pickle, which is never loaded: convert it to safetensors"
        raise CheckpointError(f"{folder}: no *.safetensors file; {remedy}")
    return files, None


def _read_index(index: Path) -> tuple[list[Path], dict[str, str]]:
    weight_map = read_json(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is missing or empty")
    for name, shard in weight_map.items():
        plain = (
            isinstance(shard, str) and Path(shard).name == shard and "\\" not in shard and "\0" not in shard
        )
        if not plain or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: tensor {name[:200]!r} is said to be in {str(shard)[:100]!r}, which is not the "
                "plain name of a safetensors file in this folder"
            )
    files = [index.parent / shard for shard in dict.fromkeys(weight_map.values())]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise CheckpointError(
            f"{index}: missing shards: {', '.join(missing[:5])}{' ...' * (len(missing) > 5)}"
        )
    return files, weight_map


class SafetensorsFiles:
    """All tensors of the model in ``folder``. Opening reads headers only; ``close`` unmaps the data.

    ``tensors``: name -> TensorInfo. ``extra_files``: names of files beside the shards.
    Errors: CheckpointError.
    """

    def __init__(self, folder: Path, extra_files: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        self._stack = ExitStack()
        self._open: dict[Path, Any] = {}
        files, index = find_shards(folder)
        for path in [*files, *(folder / name for name in extra_files)]:
            for name, info in read_header(path).items():
                stated = path.name if index is None else index.get(name, path.name)
                if stated != path.name:
                    continue  # a second copy, which the index does not point to
                if name in self.tensors:
                    raise CheckpointError(
                        f"{path}: tensor {name!r} is also in {self.tensors[name].path.name}"
                    )
                self.tensors[name] = info
        absent = [name for name in index or () if name not in self.tensors]
        if absent:
            name = absent[0]
            raise CheckpointError(
                f"{folder / (index or {})[name]}: tensor {name!r} is not there, though the index says so"
                + (f" (and {len(absent) - 1} more)" if len(absent) > 1 else "")
            )

    def __enter__(self) -> "SafetensorsFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def get(self, name: str) -> Tensor:
        """A copy of the tensor in memory, so that nothing served stays bound to the file."""
        path = self.tensors[name].path
        try:
            if path not in self._open:
                self._open[path] = self._stack.enter_context(safe_open(path, framework="pt"))
            tensor: Tensor = self._open[path].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: tensor {name!r} cannot be read ({error})") from error
        return tensor.clone()

    def close(self) -> None:
        """Unmap the files. A later ``get`` maps them again."""
        self._open.clear()
        self._stack.close()
