"""AWQ's "gemm" layout, as AutoAWQ and GPTQModel write it: 4 bits, no order of inputs.

A module NAME with K inputs, N outputs and G = K / group_size groups (1 for group_size -1):
  NAME.qweight  int32 [K, N/8]: codes, eight outputs in a word
  NAME.qzeros   int32 [G, N/8]: zero points, as they are
  NAME.scales   fp16 (bf16, fp32) [G, N]
  NAME.bias     [N], optional
Weight[n, k] = scales[k // size, n] * (code[k, n] - zero[k // size, n]). The nibbles of a word, lowest first,
are the outputs 0, 2, 4, 6, 1, 3, 5, 7 of its eight. Source: AutoAWQ 0.2.9, GPTQModel 7 (awq/packing_utils).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...kernels.layout import PackedWeight, QuantSpec
from ..errors import CheckpointError, UnsupportedModelError
from .base import FLOATS, Expected
from .dense import DenseFormat
from .fields import compiled, flag, group_size, names, refuse_foreign
from .packing import pack, unpack

BITS = 4
_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
_WHERE = "quantization_config"


@dataclass(frozen=True)
class AWQFormat:
    """Quant method "awq". skipped: modules whose names contain one of these are dense (AutoAWQ's rule).

    excluded: patterns that match the start of dense modules' names (GPTQModel's ``dynamic``, with "-:").
    """

    base: QuantSpec
    skipped: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    lm_head: bool = False
    meta: Mapping[str, Any] = field(default_factory=dict)

    quant_method = "awq"
    extra_files = ()
    sparsity: str | None = None

    @property
    def default_spec(self) -> QuantSpec | None:
        """That of all quantized modules."""
        return self.base

    @classmethod
    def from_config(cls, quantize_config: Mapping[str, Any] | None) -> "AWQFormat":
        """From config.json's quantization_config, or AutoAWQ's quant_config.json with its older keys."""
        config = quantize_config or {}
        refuse_foreign(config, {"backend": (None, "autoawq", "auto"), "desc_act": (None, False)}, _WHERE)
        keys = ("version", "checkpoint_format", "format")
        version: Any = next((config[key] for key in keys if config.get(key)), "gemm")
        bits: Any = config.get("bits", config.get("w_bit"))
        if str(version).lower() != "gemm" or isinstance(bits, bool) or bits != BITS:
            raise UnsupportedModelError(
                f"{_WHERE}: AWQ version {str(version)[:50]!r} with bits {str(bits)[:50]}: expected 'gemm' "
                "with 4; convert the checkpoint with AutoAWQ or GPTQModel, or quantize the original with "
                "nybble quantize"
            )
        flag(config, "zero_point", True, _WHERE)
        size = group_size(config.get("group_size", config.get("q_group_size", 128)), _WHERE)
        return cls(
            QuantSpec(BITS, size, symmetric=False),
            names(config, "modules_to_not_convert", _WHERE),
            _excluded(config.get("dynamic") or {}),
            flag(config, "lm_head", False, _WHERE),
            config.get("meta") or {},
        )

    def spec(self, module: str) -> QuantSpec | None:
        """The base specification; None: stored dense."""
        if module.rpartition(".")[2] == "lm_head" and not self.lm_head:
            return None
        dense = any(part in module for part in self.skipped) or any(
            re.match(p, module) for p in self.excluded
        )
        return None if dense else self.base

    def expressible(self, out: int, in_: int, spec: QuantSpec) -> str | None:
        """Why readers of this family could not hold a module of this shape; None if they can."""
        if spec.num_bits != BITS:
            return f"{spec.num_bits} bits: the format has 4"
        if spec.actorder != "none":
            return "the format has no order of inputs"
        if out % 8:
            return f"{out} outputs of 4 bits do not fill 32-bit words"
        if spec.group_size != -1 and in_ % spec.group_size:
            return f"{in_} inputs are not whole groups of {spec.group_size}"
        return None

    def tensors(self, module: str, out: int, in_: int, bias: bool) -> dict[str, Expected]:
        """qweight, qzeros, scales, and the bias of a module that has one."""
        spec = self.spec(module)
        if spec is None:
            return DenseFormat().tensors(module, out, in_, bias)
        reason = self.expressible(out, in_, spec)
        if reason is not None:
            raise CheckpointError(
                f"{module}: {reason}, so it cannot be quantized in this format; list it in the checkpoint's "
                "modules_to_not_convert"
            )
        groups = spec.num_groups(in_)
        found = {
            f"{module}.qweight": Expected(("I32",), (in_, out // 8)),
            f"{module}.qzeros": Expected(("I32",), (groups, out // 8)),
            f"{module}.scales": Expected(FLOATS, (groups, out)),
        }
        return found | ({f"{module}.bias": Expected(FLOATS, (out,))} if bias else {})

    def read(self, tensors: Mapping[str, Tensor], module: str) -> PackedWeight:
        """Codes by input and output; ``zeros`` None where all are 8."""
        spec = self.spec(module)
        if spec is None:
            return DenseFormat().read(tensors, module)
        stored = _unpack(tensors[f"{module}.qzeros"])
        zeros = None if bool((stored == 8).all()) else stored
        return PackedWeight(
            _unpack(tensors[f"{module}.qweight"]),
            replace(spec, symmetric=zeros is None),
            tensors[f"{module}.scales"].T.contiguous(),
            zeros,
            bias=tensors.get(f"{module}.bias"),
        )

    def write(self, module: str, weight: PackedWeight) -> dict[str, Tensor]:
        """The tensors of ``tensors()``. A symmetric weight's zero points are 8."""
        spec = self.spec(module)
        if spec is None:
            return DenseFormat().write(module, weight)
        self._check_writable(module, weight, spec)
        assert weight.scales is not None
        shape = (weight.out_features, spec.num_groups(weight.in_features))
        zeros = torch.full(shape, 8) if weight.zeros is None else weight.zeros
        found = {
            f"{module}.qweight": _pack(weight.values),
            f"{module}.qzeros": _pack(zeros.to(torch.uint8)),
            f"{module}.scales": weight.scales.to(torch.float16).T.contiguous(),
        }
        return found if weight.bias is None else found | {f"{module}.bias": weight.bias}

    def _check_writable(self, module: str, weight: PackedWeight, spec: QuantSpec) -> None:
        have, zeros, scales = weight.spec, weight.zeros, weight.scales
        if have is None:
            raise ValueError(f"{module}: dense; list it in modules_to_not_convert")
        if (have.num_bits, have.group_size) != (spec.num_bits, spec.group_size):
            raise ValueError(f"{module}: quantized as {have}, but the configuration says {spec}")
        reason = self.expressible(weight.out_features, weight.in_features, have)
        if reason is not None or weight.g_idx is not None:
            raise ValueError(f"{module}: {reason or 'the format has no order of inputs'}")
        if weight.outliers is not None:
            raise ValueError(f"{module}: has residuals, which need an overlay's file")
        if zeros is not None and not torch.equal(zeros.float(), zeros.to(torch.uint8).float()):
            raise ValueError(f"{module}: zero points are not whole numbers")
        assert scales is not None
        if not torch.equal(scales.half().float(), scales.float()):
            raise ValueError(f"{module}: scales are not fp16 values; round them before codes are made")

    def config_entries(self) -> dict[str, Any]:
        """quantization_config with the keys of AutoAWQ and transformers; the tensors have zero points."""
        block: dict[str, Any] = {
            "quant_method": "awq",
            "version": "gemm",
            "bits": BITS,
            "group_size": self.base.group_size,
            "zero_point": True,
            "modules_to_not_convert": list(self.skipped) or None,
            "meta": dict(self.meta),
        }
        # GPTQModel looks at ``dynamic`` only, the others at the list of names only.
        excluded = [*self.excluded, *(f".*{re.escape(name)}" for name in self.skipped)]
        if excluded:
            block["dynamic"] = {f"-:{pattern}": {} for pattern in dict.fromkeys(excluded)}
        if self.lm_head:
            block["lm_head"] = True
        return {"quantization_config": block}


def _excluded(dynamic: Any) -> tuple[str, ...]:
    if not isinstance(dynamic, dict) or not all(pattern.startswith("-:") for pattern in dynamic):
        raise UnsupportedModelError(
            f"{_WHERE}: dynamic: AWQ modules are all alike or dense (patterns of '-:')"
        )
    return compiled([pattern.removeprefix("-:") for pattern in dynamic], _WHERE)


def _unpack(words: Tensor) -> Tensor:
    """[R, N/8] int32 -> [N, R] uint8."""
    stored = unpack(words, BITS, words.shape[1] * 8).view(len(words), -1, 8)
    codes = torch.empty_like(stored)
    codes[:, :, _ORDER] = stored
    return codes.view(len(words), -1).T.contiguous()


def _pack(codes: Tensor) -> Tensor:
    """[N, R] uint8 -> [R, N/8] int32."""
    rows = codes.T.reshape(codes.shape[1], -1, 8)[:, :, _ORDER]
    return pack(rows.reshape(len(rows), -1), BITS)
