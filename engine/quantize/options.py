"""What ``nybble quantize`` was asked for, validated once."""

from dataclasses import dataclass
from typing import Literal

from ...kernels.layout import QuantSpec
from ..errors import ConfigError

GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)  # those that GPTQModel reads


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """model: folder or hub id. out: the new folder. Everything else has the CLI option's name.

    checkpoint_format None: "gptq" (v1) for symmetric, "gptq_v2" for asymmetric weights.
    calibration None: the text in this package. damping: share of the mean of H's diagonal.
    mse: exponent of the range search, 0: off. group_size -1: one group over each row.
    """

    model: str
    out: str
    method: str = "gptq"
    revision: str | None = None
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    actorder: Literal["none", "group"] = "none"
    checkpoint_format: Literal["gptq", "gptq_v2"] | None = None
    calibration: str | None = None
    num_samples: int = 128
    seq_len: int = 2048
    damping: float = 0.01
    mse: float = 0.0
    seed: int = 0
    overwrite: bool = False
    num_threads: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise ConfigError(f"--bits {self.bits}: use 2, 3, 4 or 8")
        if self.group_size not in GROUP_SIZES:
            raise ConfigError(
                f"--group-size {self.group_size}: use one of {', '.join(map(str, GROUP_SIZES))}"
            )
        if self.actorder not in ("none", "group"):
            raise ConfigError(f"--actorder {self.actorder}: use none or group")
        if self.checkpoint_format not in (None, "gptq", "gptq_v2"):
            raise ConfigError(f"--checkpoint-format {self.checkpoint_format}: use gptq or gptq_v2")
        for option, value, least in (
            ("--num-samples", self.num_samples, 1),
            ("--seq-len", self.seq_len, 2),
            ("--num-threads", self.num_threads, 1),
        ):
            if value is not None and value < least:
                raise ConfigError(f"{option} {value}: must be at least {least}")
        if not 0 < self.damping <= 1:  # NaN fails too
            raise ConfigError(f"--damping {self.damping}: must be above 0 and at most 1")
        if not (self.mse == 0 or 1 <= self.mse <= 10):
            raise ConfigError(f"--mse {self.mse}: use 0 (off) or an exponent from 1 to 10 (2.4 is usual)")

    @property
    def spec(self) -> QuantSpec:
        """How each module is to be quantized."""
        return QuantSpec(self.bits, self.group_size, self.symmetric, self.actorder)

    @property
    def storage(self) -> Literal["gptq", "gptq_v2"]:
        """The checkpoint format to write."""
        return self.checkpoint_format or ("gptq" if self.symmetric else "gptq_v2")

    def refuse_actorder(self, method: str, why: str) -> None:
        """ConfigError where an order of inputs was asked for that ``method`` has no use for."""
        if self.actorder != "none":
            raise ConfigError(f"--actorder {self.actorder}: {method} has no order, {why}; use none, or gptq")
