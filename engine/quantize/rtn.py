"""Round to nearest: no statistics, one module in memory. The baseline that every other method must beat."""

from collections.abc import Iterator
from dataclasses import dataclass

from ..model.config import ModelConfig
from .calibrate import Calibration
from .options import QuantizeOptions
from .pipeline import QuantizedModule, Specs, modulewise
from .source import Source


@dataclass(frozen=True, slots=True)
class RTN:
    """mse: exponent of the search for the range, 0 takes the whole range."""

    mse: float = 0.0
    statistics = ""

    @classmethod
    def from_options(cls, options: QuantizeOptions) -> "RTN":
        """Raises ConfigError for an option that rounding to nearest has no use for."""
        options.refuse_actorder("rtn", "it rounds every weight by itself")
        return cls(options.mse)

    def settings(self) -> dict[str, object]:
        """See Method."""
        return {"mse": self.mse}

    def peak_bytes(self, config: ModelConfig, num_tokens: int) -> int:
        """One module: as stored, in fp32, and five times that for rounding, errors and packing."""
        widest = max(config.intermediate_size, config.num_heads * config.head_dim)
        return 24 * widest * config.hidden_size

    def run(self, source: Source, calibration: Calibration | None, specs: Specs) -> Iterator[QuantizedModule]:
        """See Method."""
        return modulewise(source, specs, self.mse)
