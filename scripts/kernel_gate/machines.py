"""The GPUs that kernels are compiled for: what a block may use, and what the predictions assume of each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """A target and the GPU that stands for it.

    ``shared_limit``: bytes of shared memory that the driver gives one block (compilation does not check it);
    ``shared_per_sm``, ``threads_per_sm``, ``blocks_per_sm``, ``registers_per_sm`` bound resident blocks.
    ``copy_tb_s``: what a copy reaches: 4.3 was measured on an H200, elsewhere 0.9 of the data sheet.
    ``l2_tb_s``: what SMs read from L2, by microbenchmarks of others (leads, good to a quarter).
    """

    target: str
    name: str
    sms: int
    ghz: float
    copy_tb_s: float
    l2_tb_s: float
    shared_limit: int
    shared_per_sm: int
    threads_per_sm: int
    blocks_per_sm: int
    registers_per_sm: int = 65536

    @property
    def is_cuda(self) -> bool:
        """An NVIDIA target."""
        return self.target.startswith("sm_")


MACHINES = {
    m.target: m
    for m in (
        Machine("sm_80", "A100 80 GB", 108, 1.41, 1.83, 4.5, 166912, 167936, 2048, 32),
        Machine("sm_86", "RTX 3090", 82, 1.695, 0.84, 2.0, 101376, 102400, 1536, 16),
        Machine("sm_89", "RTX 4090", 128, 2.52, 0.91, 4.5, 101376, 102400, 1536, 24),
        Machine("sm_90", "H200", 132, 1.755, 4.3, 5.7, 232448, 233472, 2048, 32),
        Machine("sm_100", "B200", 148, 1.85, 7.2, 10.0, 232448, 233472, 2048, 32),
        Machine("sm_120", "RTX 5090", 170, 2.41, 1.61, 5.7, 101376, 102400, 1536, 24),
        Machine("gfx942", "MI300X", 304, 2.1, 4.77, 10.0, 65536, 65536, 2048, 16, 131072),
    )
}
