"""What this machine lets this process use: cores, CPU features, memory. Linux's files under ``root``.

``root`` is "/" but in tests. Where a file is absent (another system, an old kernel) the next best source
is taken; a quota or limit that is not stated does not count. Sources: proc(5), cgroups(7), the kernel's
admin-guide/cgroup-v2.rst and cgroup-v1/.
"""

import ctypes
import os
import resource
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")
_M_MMAP_THRESHOLD = -3  # mallopt(3)
_RETURNED = 4 << 20  # bytes of a block that leaves the process when it is freed


def affinity() -> list[int]:
    """The CPUs this process may run on, sorted."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def physical_cores(root: Path = _ROOT, cpus: list[int] | None = None) -> int:
    """Physical cores among ``cpus`` (default: the affinity): hyper-threads of one core count once."""
    wanted = affinity() if cpus is None else cpus
    cores = {_siblings(root, cpu) for cpu in wanted}
    if None not in cores:
        return max(1, len(cores))
    listed = _cpuinfo_cores(root)
    return max(1, len({listed.get(cpu, ("cpu", str(cpu))) for cpu in wanted}))


def cpu_quota(root: Path = _ROOT) -> float | None:
    """CPUs' worth of time that the cgroup grants (the tightest of it and its parents); None: no quota."""
    quotas: list[float] = []
    for folder in _cgroup_folders(root, "cpu"):
        stated = (_read(folder / "cpu.max") or "").split()
        if len(stated) == 2:
            quota, period = stated
        else:
            quota = _read(folder / "cpu.cfs_quota_us") or "-1"
            period = _read(folder / "cpu.cfs_period_us") or "100000"
        if quota.isdecimal() and period.isdecimal() and int(period) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def usable_cpus(root: Path = _ROOT) -> float:
    """CPUs' worth of time: what affinity and cgroup quota both allow, hyper-threads counted."""
    quota = cpu_quota(root)
    cpus = float(len(affinity()))
    return cpus if quota is None else min(cpus, quota)


def default_threads(root: Path = _ROOT, cpus: list[int] | None = None) -> int:
    """Threads for the engine: physical cores within the quota, rounded down (a throttled team stalls)."""
    quota = cpu_quota(root)
    cores = physical_cores(root, cpus)
    return cores if quota is None else max(1, min(cores, int(quota)))


def available_memory(root: Path = _ROOT) -> int:
    """Bytes this process can still take: free on the machine, under every cgroup limit above it and under its
    own (RLIMIT_DATA, which a quantization job gets).

    Pages of files that nobody used lately are counted as free, as the kernel gives them back.
    """
    free = [_machine_available(root)]
    for folder in _cgroup_folders(root, "memory"):
        limit = _number(folder / "memory.max", folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current", folder / "memory.usage_in_bytes")
        if limit is not None and used is not None:
            free.append(limit - max(0, used - _inactive_file(folder)))
    own, _ = resource.getrlimit(resource.RLIMIT_DATA)
    fields = (_read(root / "proc/self/statm") or "").split()
    if own != resource.RLIM_INFINITY and len(fields) > 5 and fields[5].isdecimal():
        free.append(own - int(fields[5]) * os.sysconf("SC_PAGE_SIZE"))
    return max(0, min(free))


def process_memory(root: Path = _ROOT) -> int:
    """Bytes of memory this process holds now (resident set); its peak where only that is known."""
    fields = (_read(root / "proc/self/statm") or "").split()
    if len(fields) > 1 and fields[1].isdecimal():
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def return_freed_memory() -> None:
    """Let freed tensors leave this process, where the C library is glibc.

    With every block that is freed, it raises the size from which blocks have a mapping of their own, up to
    32 MiB; those below share a heap, in whose holes activations of another size find no room.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _RETURNED)


def cpu_features(root: Path = _ROOT) -> frozenset[str]:
    """The CPU's feature flags as Linux names them (avx2, avx512_vnni, asimddp...); empty if unknown."""
    for line in (_read(root / "proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def cpu_name(root: Path = _ROOT) -> str:
    """The CPU's model name with its family and model numbers, which tell generations apart where a hypervisor
    hides the name ("AMD EPYC, family 25 model 1"); "" if unknown.
    """
    found: dict[str, str] = {}
    for line in (_read(root / "proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    name, family, model = (found.get(key, "") for key in ("model name", "cpu family", "model"))
    return f"{name}, family {family} model {model}" if name and family and model else name


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None


def _number(*paths: Path) -> int | None:
    for path in paths:
        text = _read(path)
        if text is not None and text.isdecimal():
            return int(text)
    return None


def _siblings(root: Path, cpu: int) -> str | None:
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    return _read(topology / "core_cpus_list") or _read(topology / "thread_siblings_list")


def _cpuinfo_cores(root: Path) -> dict[int, tuple[str, str]]:
    cores: dict[int, tuple[str, str]] = {}
    for block in (_read(root / "proc/cpuinfo") or "").split("\n\n"):
        pairs = (line.partition(":") for line in block.splitlines())
        fields = {key.strip(): value.strip() for key, _, value in pairs}
        if fields.get("processor", "").isdecimal() and "core id" in fields:
            cores[int(fields["processor"])] = (fields.get("physical id", "0"), fields["core id"])
    return cores


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """This process's cgroup folders for ``controller``, v2 then v1, each followed by its parents.

    In a container without a cgroup namespace /proc/self/cgroup names the host's path, which is not
    mounted here; the container's own group is then the mount's root.
    """
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if names == "":
            mounts = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif controller in names.split(","):
            mounts = [root / "sys/fs/cgroup" / names, root / "sys/fs/cgroup" / controller]
        else:
            continue
        for mount in mounts:
            if mount.is_dir():
                parts = [part for part in path.split("/") if part and part != ".."]
                for depth in range(len(parts), -1, -1):
                    yield mount.joinpath(*parts[:depth])
                break


def _inactive_file(folder: Path) -> int:
    fields = dict(
        pair for line in (_read(folder / "memory.stat") or "").splitlines() if len(pair := line.split()) == 2
    )
    # v1 counts the children under "total_"; v2 has the plain name only.
    stated = fields.get("total_inactive_file", fields.get("inactive_file", "0"))
    return int(stated) if stated.isdecimal() else 0


def _machine_available(root: Path) -> int:
    for line in (_read(root / "proc/meminfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key == "MemAvailable":
            return int(value.split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cache_folder() -> Path:
    """Where this user's caches are: ``$XDG_CACHE_HOME/nybble`` or ``~/.cache/nybble``, made if it can be.

    Where neither can be written to (a container's read-only root), a folder of the user's own in the
    temporary directory.
    """
    stated = os.environ.get("XDG_CACHE_HOME")
    wanted = Path(stated) if stated else Path.home() / ".cache"
    folder = wanted / "nybble"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    folder = Path(tempfile.gettempdir()) / f"nybble-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder
