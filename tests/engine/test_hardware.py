"""Cores, quotas and limits read from a pretended root."""

import mmap
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from nybble.engine import hardware

GIB = 1 << 30


def put(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def topology(pairs: dict[int, str]) -> dict[str, str]:
    folder = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    return {folder.format(cpu): siblings for cpu, siblings in pairs.items()}


def test_hyper_threads_of_a_core_count_once(tmp_path: Path) -> None:
    put(tmp_path, topology({0: "0,4", 1: "1,5", 4: "0,4", 5: "1,5"}))
    assert hardware.physical_cores(tmp_path, [0, 1, 4, 5]) == 2
    assert hardware.physical_cores(tmp_path, [0, 1]) == 2
    assert hardware.physical_cores(tmp_path, [0, 4]) == 1


def test_cpuinfo_where_there_is_no_topology(tmp_path: Path) -> None:
    blocks = [
        f"processor\t: {cpu}\nphysical id\t: {socket}\ncore id\t: {core}\nflags\t\t: fpu avx2 avx512_vnni"
        for cpu, socket, core in [(0, 0, 0), (1, 0, 1), (2, 0, 0), (3, 1, 0)]
    ]
    put(tmp_path, {"proc/cpuinfo": "\n\n".join(blocks)})
    assert hardware.physical_cores(tmp_path, [0, 1, 2, 3]) == 3
    assert hardware.cpu_features(tmp_path) == {"fpu", "avx2", "avx512_vnni"}


def test_nothing_known_counts_every_cpu(tmp_path: Path) -> None:
    assert hardware.physical_cores(tmp_path, [0, 1, 2]) == 3
    assert hardware.cpu_features(tmp_path) == frozenset()
    assert hardware.cpu_quota(tmp_path) is None
    assert hardware.default_threads(tmp_path, [0, 1, 2]) == 3


def test_cgroup_v2_quota_is_the_tightest_of_the_group_and_its_parents(tmp_path: Path) -> None:
    put(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pods/ours",
            "sys/fs/cgroup/pods/ours/cpu.max": "max 100000",
            "sys/fs/cgroup/pods/cpu.max": "250000 100000",
            "sys/fs/cgroup/cpu.max": "max 100000",
        },
    )
    assert hardware.cpu_quota(tmp_path) == 2.5
    assert hardware.default_threads(tmp_path, [0, 1, 2, 3]) == 2
    put(tmp_path, {"sys/fs/cgroup/pods/ours/cpu.max": "50000 100000"})
    assert hardware.usable_cpus(tmp_path) == 0.5
    assert hardware.default_threads(tmp_path, [0, 1]) == 1


def test_cgroup_v1_quota_and_memory(tmp_path: Path) -> None:
    put(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n1:name=systemd:/",
            "proc/meminfo": f"MemTotal: {64 * GIB // 1024} kB\nMemAvailable: {32 * GIB // 1024} kB",
            # The host's path is not mounted in the container: its own group is the root of the mount.
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "150000",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(8 * GIB),
            "sys/fs/cgroup/memory/memory.usage_in_bytes": str(5 * GIB),
            "sys/fs/cgroup/memory/memory.stat": f"cache 1\ninactive_file 7\ntotal_inactive_file {2 * GIB}",
        },
    )
    assert hardware.cpu_quota(tmp_path) == 1.5
    assert hardware.default_threads(tmp_path, [0, 1, 2, 3]) == 1
    assert hardware.available_memory(tmp_path) == 8 * GIB - 3 * GIB


def test_no_limit_means_the_machines_free_memory(tmp_path: Path) -> None:
    put(
        tmp_path,
        {
            "proc/self/cgroup": "0::/",
            "proc/meminfo": f"MemAvailable: {3 * GIB // 1024} kB",
            "sys/fs/cgroup/memory.max": "max",
            "sys/fs/cgroup/memory.current": str(GIB),
        },
    )
    assert hardware.available_memory(tmp_path) == 3 * GIB


def test_over_the_limit_is_nothing_free(tmp_path: Path) -> None:
    put(
        tmp_path,
        {
            "proc/self/cgroup": "0::/x",
            "proc/meminfo": f"MemAvailable: {GIB // 1024} kB",
            "sys/fs/cgroup/x/memory.max": "100",
            "sys/fs/cgroup/x/memory.current": "200",
        },
    )
    assert hardware.available_memory(tmp_path) == 0


@pytest.mark.parametrize("text", ["", "garbage", "-1 100000", "1e5 100000", "100000 0"])
def test_a_strange_quota_does_not_count(tmp_path: Path, text: str) -> None:
    put(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": text})
    assert hardware.cpu_quota(tmp_path) is None


def test_this_machine() -> None:
    assert 1 <= hardware.default_threads() <= (os.cpu_count() or 1)
    assert hardware.available_memory() > 0
    before = hardware.process_memory()
    with mmap.mmap(-1, 64 << 20) as fresh:  # pages that no allocator could have had already
        fresh.write(b"\x01" * len(fresh))
        assert hardware.process_memory() - before > 48 << 20


HOLES = """
import sys
import torch
from nybble.engine.hardware import process_memory, return_freed_memory

if sys.argv[1] == "return":
    return_freed_memory()
torch.ones(6 << 20)  # 24 MiB: once it is freed, glibc puts blocks below that into its heap
before = process_memory()
many = [torch.ones(2 << 20) for _ in range(16)]
last = many[-1]
del many
print((process_memory() - before) >> 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's heap")
def test_freed_memory_leaves_the_process(child_environment: dict[str, str]) -> None:
    """15 tensors of 8 MiB below one that stays."""
    left = {}
    for how in ("return", "keep"):
        command = [sys.executable, "-P", "-c", HOLES, how]
        done = subprocess.run(command, capture_output=True, text=True, env=child_environment, check=True)
        left[how] = int(done.stdout)
    assert left["return"] < 16
    assert left["keep"] > 100, "the C library needs no help any more"


LIMITED = """
import mmap
import resource
from nybble.engine.hardware import available_memory

resource.setrlimit(resource.RLIMIT_DATA, (1 << 29, 1 << 29))
print(available_memory())
taken = mmap.mmap(-1, 128 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
print(available_memory())
"""


def test_its_own_limit_counts(child_environment: dict[str, str]) -> None:
    """That of a quantization job, which refuses what it could not hold."""
    command = [sys.executable, "-P", "-c", LIMITED]
    done = subprocess.run(command, capture_output=True, text=True, env=child_environment, check=True)
    first, second = map(int, done.stdout.split())
    assert first < 1 << 29
    assert first - second == pytest.approx(128 << 20, rel=0.05)


def test_a_cpu_is_named_with_its_family_and_model(tmp_path: Path) -> None:
    put(tmp_path, {"proc/cpuinfo": "cpu family\t: 25\nmodel\t\t: 1\nmodel name\t: AMD EPYC\n\nmodel\t\t: 9"})
    assert hardware.cpu_name(tmp_path) == "AMD EPYC, family 25 model 1"


def test_a_cpu_without_numbers_keeps_its_name(tmp_path: Path) -> None:
    put(tmp_path, {"proc/cpuinfo": "model name\t: Some CPU"})
    assert hardware.cpu_name(tmp_path) == "Some CPU"
    assert hardware.cpu_name(tmp_path / "nowhere") == ""
