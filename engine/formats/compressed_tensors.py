"""compressed-tensors: "pack-quantized" integers of 2, 4 and 8 bits, and "sparse-24-bitmask" floats.

A module NAME with K inputs, N outputs, b bits and G groups (1 for strategy "channel"), packed:
  NAME.weight_packed      int32 [N, ceil(K*b/32)]: codes along the inputs, least significant bits first
  NAME.weight_scale       fp16, bf16 or fp32 [N, G]
  NAME.weight_zero_point  int32 [ceil(N*b/32), G], asymmetric only: packed along the outputs
  NAME.weight_g_idx       int32 [K], actorder "group" only: the group of each input, or all -1 for none
  NAME.weight_shape       int64 [2]: N, K
Codes and zeros are signed numbers plus 2**(b - 1). Weight[n, k] = scale[n, g] * (code[n, k] - zero[n, g]).
And 2:4 sparse floats:
  NAME.compressed         fp16, bf16 or fp32 [N, K/2]: the two kept of every four inputs, in order
  NAME.bitmask            uint8 [N, ceil(K/8)]: bit j of byte i: input 8*i + j is kept
  NAME.shape              int64 [2, 1]: N, K
Source: compressed-tensors 0.20 and, for what it dropped (g_idx, bitmasks), 0.14.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...kernels.layout import PackedWeight, QuantSpec
from ..errors import CheckpointError, UnsupportedModelError
from .base import FLOATS, Expected
from .bitmask24 import bitmask_tensors, read_bitmask, write_bitmask
from .dense import DenseFormat
from .fields import compiled, flag, group_size, names, refuse_foreign
from .packing import pack, unpack

BITS = (2, 4, 8)
_WHERE = "quantization_config"
_NOTHING: tuple[Any, ...] = (None, {}, [])
_NEUTRAL = {"kv_cache_scheme": _NOTHING, "transform_config": _NOTHING}
_NEUTRAL_GROUP = {
    "input_activations": _NOTHING,
    "output_activations": _NOTHING,
    "format": (None, "pack-quantized"),
}
_NEUTRAL_WEIGHTS = {"type": ("int", None), "dynamic": (None, False), "block_structure": (None,)}
_ORDERS = {
    None: "none",
    False: "none",
    "weight": "none",
    "static": "none",
    "group": "group",
    "dynamic": "group",
}


@dataclass(frozen=True)
class Group:
    """Modules with one specification. targets: names, "re:" patterns or "Linear", which is every module."""

    targets: tuple[str, ...]
    spec: QuantSpec


@dataclass(frozen=True)
class CompressedTensorsFormat:
    """Quant method "compressed-tensors".

    groups: the most specific target decides (a name, then patterns, then the class). ignore: dense modules.
    bitmask: targets that are stored as 2:4 sparse floats, of which ``sparsity`` speaks then.
    """

    groups: tuple[Group, ...] = ()
    ignore: tuple[str, ...] = ()
    bitmask: tuple[str, ...] = ()
    sparsity: str | None = None

    quant_method = "compressed-tensors"
    extra_files = ()

    @property
    def default_spec(self) -> QuantSpec | None:
        """The first group's; None if all are floats."""
        return self.groups[0].spec if self.groups else None

    @classmethod
    def from_config(cls, quantize_config: Mapping[str, Any] | None) -> "CompressedTensorsFormat":
        """From config.json's quantization_config (or compression_config)."""
        config = quantize_config or {}
        refuse_foreign(config, _NEUTRAL, _WHERE)
        sparsity = _object(config, "sparsity_config", _WHERE)
        groups = _object(config, "config_groups", _WHERE)
        stored = sparsity.get("format") or "dense"
        bitmask = stored == "sparse-24-bitmask"
        if groups and config.get("format") != "pack-quantized":
            raise _unsupported(f"format {config.get('format')!r}")
        if not bitmask and stored != "dense":
            raise _unsupported(f"sparsity_config: format {stored!r}")
        if bitmask and groups:
            raise _unsupported("sparsity_config: sparse-24-bitmask on top of quantized weights")
        ignore = names(config, "ignore", _WHERE) + names(sparsity, "ignore", f"{_WHERE}: sparsity_config")
        structure = sparsity.get("sparsity_structure")
        return cls(
            tuple(_group(name, group) for name, group in groups.items()),
            _patterns(dict.fromkeys(ignore) if groups or bitmask else ()),
            _patterns(names(sparsity, "targets", f"{_WHERE}: sparsity_config") or ("Linear",))
            if bitmask
            else (),
            "2:4" if structure == "2:4" or bitmask else None,
        )

    def spec(self, module: str) -> QuantSpec | None:
        """Of the most specific target; None: stored as floats."""
        if any(_matches(target, module) for target in self.ignore):
            return None
        found = [
            (rank, group.spec)
            for group in self.groups
            for target in group.targets
            if (rank := _matches(target, module))
        ]
        return min(found, key=lambda item: item[0])[1] if found else None

    def _is_bitmask(self, module: str) -> bool:
        return any(_matches(t, module) for t in self.bitmask) and not any(
            _matches(t, module) for t in self.ignore
        )

    def expressible(self, out: int, in_: int, spec: QuantSpec) -> str | None:
        """Why readers of this family could not hold a module of this shape; None if they can."""
        if spec.num_bits not in BITS:
            return f"{spec.num_bits} bits: the format has {', '.join(map(str, BITS))}"
        if spec.group_size != -1 and in_ % spec.group_size:
            return f"{in_} inputs are not whole groups of {spec.group_size}"
        return None

    def tensors(self, module: str, out: int, in_: int, bias: bool) -> dict[str, Expected]:
        """weight_packed, weight_scale, weight_shape and what the specification adds; or a bitmask's three."""
        spec = self.spec(module)
        found = {f"{module}.bias": Expected(FLOATS, (out,))} if bias else {}
        if spec is None:
            if self._is_bitmask(module):
                return bitmask_tensors(module, out, in_) | found
            return DenseFormat().tensors(module, out, in_, bias)
        reason = self.expressible(out, in_, spec)
        if reason is not None:
            raise CheckpointError(f"{module}: {reason}; list it in the checkpoint's ignore")
        bits, groups = spec.num_bits, spec.num_groups(in_)
        found[f"{module}.weight_packed"] = Expected(("I32",), (out, _words(in_, bits)))
        found[f"{module}.weight_scale"] = Expected(FLOATS, (out, groups))
        found[f"{module}.weight_shape"] = Expected(("I64", "I32"), (2,))
        if spec.symmetric:  # older writers store its zeros, one byte each
            found[f"{module}.weight_zero_point"] = Expected(("I8",), (out, groups), required=False)
        else:
            found[f"{module}.weight_zero_point"] = Expected(("I32",), (_words(out, bits), groups))
        if spec.actorder == "group":
            found[f"{module}.weight_g_idx"] = Expected(("I32",), (in_,))
        return found

    def read(self, tensors: Mapping[str, Tensor], module: str) -> PackedWeight:
        """``zeros`` and ``g_idx`` are None where trivial; a bitmask comes as floats."""
        spec = self.spec(module)
        bias = tensors.get(f"{module}.bias")
        if spec is None:
            if self._is_bitmask(module):
                return PackedWeight(read_bitmask(tensors, module), bias=bias)
            return DenseFormat().read(tensors, module)
        packed, bits = tensors[f"{module}.weight_packed"], spec.num_bits
        out, in_ = _shape(module, tensors[f"{module}.weight_shape"], packed, bits)
        zeros = _read_zeros(module, tensors.get(f"{module}.weight_zero_point"), spec, out)
        g_idx = _read_g_idx(module, tensors.get(f"{module}.weight_g_idx"), spec, in_)
        return PackedWeight(
            _unpack(packed, bits, in_),
            replace(spec, symmetric=zeros is None, actorder="none" if g_idx is None else "group"),
            tensors[f"{module}.weight_scale"],
            zeros,
            g_idx,
            bias,
        )

    def write(self, module: str, weight: PackedWeight) -> dict[str, Tensor]:
        """The tensors of ``tensors()``."""
        spec = self.spec(module)
        bias = {} if weight.bias is None else {f"{module}.bias": weight.bias}
        if spec is None:
            if self._is_bitmask(module):
                return write_bitmask(module, weight) | bias
            return DenseFormat().write(module, weight)
        self._check_writable(module, weight, spec)
        assert weight.scales is not None
        bits = spec.num_bits
        found = {
            f"{module}.weight_packed": _pack(weight.values, bits),
            f"{module}.weight_scale": weight.scales,
            f"{module}.weight_shape": torch.tensor(weight.values.shape),
        }
        if not spec.symmetric:
            zeros = torch.full_like(weight.scales, 2 ** (bits - 1)) if weight.zeros is None else weight.zeros
            packed = _pack(zeros.to(torch.uint8).T.contiguous(), bits)
            found[f"{module}.weight_zero_point"] = packed.T.contiguous()
        if spec.actorder == "group":
            found[f"{module}.weight_g_idx"] = weight.group_of_inputs().to(torch.int32)
        return found | bias

    def _check_writable(self, module: str, weight: PackedWeight, spec: QuantSpec) -> None:
        have, zeros = weight.spec, weight.zeros
        if have is None:
            raise ValueError(f"{module}: dense; list it in ignore")
        if (have.num_bits, have.group_size) != (spec.num_bits, spec.group_size):
            raise ValueError(f"{module}: quantized as {have}, but the configuration says {spec}")
        reason = self.expressible(weight.out_features, weight.in_features, spec)
        if reason is not None:
            raise ValueError(f"{module}: {reason}")
        if weight.g_idx is not None and spec.actorder == "none":
            raise ValueError(f"{module}: has an order of inputs, but the configuration says no actorder")
        if weight.outliers is not None:
            raise ValueError(f"{module}: has residuals, which need an overlay's file")
        if zeros is not None:
            if not torch.equal(zeros.float(), zeros.to(torch.uint8).float()):
                raise ValueError(f"{module}: zero points are not whole numbers")
            if spec.symmetric and bool((zeros != 2 ** (spec.num_bits - 1)).any()):
                raise ValueError(f"{module}: asymmetric, but the configuration says symmetric")

    def config_entries(self) -> dict[str, Any]:
        """quantization_config with the library's keys."""
        block: dict[str, Any] = {"quant_method": self.quant_method}
        if self.groups:
            block |= {
                "format": "pack-quantized",
                "quantization_status": "compressed",
                "config_groups": {f"group_{i}": _group_block(group) for i, group in enumerate(self.groups)},
                "ignore": list(self.ignore),
            }
        if self.bitmask or self.sparsity:
            block["sparsity_config"] = {
                "format": "sparse-24-bitmask" if self.bitmask else "dense",
                "sparsity_structure": "2:4",
                "targets": list(self.bitmask or ("Linear",)),
                "ignore": list(self.ignore),
            }
        return {"quantization_config": block}


def _unsupported(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{_WHERE}: {what[:200]} is not supported (pack-quantized integers of 2, 4 and 8 bits are, and "
        "sparse-24-bitmask floats); take another checkpoint, or quantize the original with nybble quantize"
    )


def _object(config: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: {key} {str(value)[:100]!r}: expected an object")
    return value


def _group(name: str, group: Any) -> Group:
    where = f"{_WHERE}: config_groups: {name[:100]}"
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        raise CheckpointError(f"{where}: expected an object with targets and weights")
    refuse_foreign(group, _NEUTRAL_GROUP, where)
    weights = group["weights"]
    refuse_foreign(weights, _NEUTRAL_WEIGHTS, f"{where}: weights")
    bits, order = weights.get("num_bits"), weights.get("actorder")
    if isinstance(bits, bool) or bits not in BITS:
        raise _unsupported(f"config_groups: {name}: num_bits {bits!r}")
    if order not in _ORDERS:
        raise _unsupported(f"config_groups: {name}: actorder {order!r}")
    size = weights.get("group_size")
    inferred = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy, size = weights.get("strategy") or inferred, -1 if size is None else group_size(size, where)
    if strategy not in ("group", "channel") or (strategy == "group") != (size > 0):
        raise _unsupported(f"config_groups: {name}: strategy {strategy!r} with group_size {size}")
    symmetric = flag(weights, "symmetric", True, where)
    targets = _patterns(names(group, "targets", where))
    return Group(targets, QuantSpec(bits, size, symmetric, "group" if _ORDERS[order] == "group" else "none"))


def _group_block(group: Group) -> dict[str, Any]:
    spec = group.spec
    weights: dict[str, Any] = {
        "num_bits": spec.num_bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": "channel" if spec.group_size == -1 else "group",
        "group_size": None if spec.group_size == -1 else spec.group_size,
        "dynamic": False,
    }
    if spec.actorder == "group":
        weights["actorder"] = "group"
    return {"targets": list(group.targets), "weights": weights}


def _patterns(targets: Iterable[str]) -> tuple[str, ...]:
    found = tuple(targets)
    compiled((target.removeprefix("re:") for target in found if target.startswith("re:")), _WHERE)
    return found


def _matches(target: str, module: str) -> int:
    """1: the module's name, 2: a pattern of it, 3: the class of linears; 0: no match."""
    if target == module:
        return 1
    if target.startswith("re:"):
        return 2 if re.match(target.removeprefix("re:"), module) else 0
    return 3 if target == "Linear" else 0


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def _unpack(words: Tensor, bits: int, count: int) -> Tensor:
    return unpack(words, bits, words.shape[1] * 32 // bits)[:, :count].contiguous()


def _pack(codes: Tensor, bits: int) -> Tensor:
    return pack(torch.nn.functional.pad(codes, (0, -codes.shape[1] % (32 // bits))), bits)


def _shape(module: str, stated: Tensor, packed: Tensor, bits: int) -> tuple[int, int]:
    out, in_ = stated.tolist()
    if out != packed.shape[0] or in_ < 1 or _words(in_, bits) != packed.shape[1]:
        raise CheckpointError(
            f"{module}.weight_shape: [{out}, {in_}], but weight_packed {list(packed.shape)} holds "
            f"{packed.shape[0]} rows of {packed.shape[1] * 32 // bits} codes of {bits} bits"
        )
    return out, in_


def _read_zeros(module: str, stored: Tensor | None, spec: QuantSpec, out: int) -> Tensor | None:
    if stored is None:
        return None
    if spec.symmetric:
        if bool(stored.any()):
            raise CheckpointError(
                f"{module}.weight_zero_point: not zero, but the configuration says symmetric"
            )
        return None
    zeros = _unpack(stored.T.contiguous(), spec.num_bits, out).T.contiguous()
    return None if bool((zeros == 2 ** (spec.num_bits - 1)).all()) else zeros


def _read_g_idx(module: str, g_idx: Tensor | None, spec: QuantSpec, in_: int) -> Tensor | None:
    if g_idx is None or bool((g_idx == -1).all()):
        return None
    groups = spec.num_groups(in_)
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        raise CheckpointError(f"{module}.weight_g_idx: groups {low} to {high}, but there are {groups}")
    size = in_ if spec.group_size == -1 else spec.group_size
    return None if torch.equal(g_idx, torch.arange(in_, dtype=torch.int32) // size) else g_idx
