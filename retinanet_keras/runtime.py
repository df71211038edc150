"""Set up the process before TensorFlow is imported: its CPU kernels, memory, threads and log level.

These are defaults: variables set in the environment take precedence, and `RETINANET_KERAS_RUNTIME=off` leaves the
process as it is. Importing the package calls `set_up()`; commands call it again with the work that they will run.

Kernels. TensorFlow has two sets for x86-64 CPUs, its own and oneDNN's, and reads `TF_ENABLE_ONEDNN_OPTS` once, when it
is imported. On processors with AVX-512 VNNI, AVX-512 BF16 or AMX it chooses oneDNN. On others neither is always faster:
oneDNN's are faster in small networks and in exported graphs, TensorFlow's own in training a ResNet-50 or larger, and by
a factor of two on a single image where the weights are variables. `benchmarks/environment.py` measures this.

Memory. TensorFlow allocates the output of each operation anew, and glibc returns large blocks to the system at once, so
that their pages are mapped and cleared again in each step. Here glibc is told to keep them.

Threads. TensorFlow starts as many threads as the machine has CPUs, even in a container that may use fewer.
"""

import contextlib
import ctypes
import logging
import math
import os
import platform
import sys
from pathlib import Path

SWITCH = "RETINANET_KERAS_RUNTIME"
CHOSEN = "RETINANET_KERAS_CHOSEN"  # variables set here, not by the user; inherited by child processes
KERNELS = "TF_ENABLE_ONEDNN_OPTS"
LOG_LEVEL = "TF_CPP_MIN_LOG_LEVEL"
THREADS = ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")
MEMORY = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")
ONEDNN_FLAGS = {"avx512_vnni", "avx512_bf16", "amx_tile"}  # with one of them TensorFlow turns oneDNN on by itself
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGE_TRAINING, OTHER = "large training", "other"  # kinds of work to choose kernels for

logger = logging.getLogger("retinanet_keras")
_warned: set[str] = set()


def set_up(work: str | None = None) -> None:
    """Apply the defaults for this machine. To be called before TensorFlow is imported.

    Args:
        work: str or None. LARGE_TRAINING for training a ResNet-50 or larger; OTHER for any other command; None where it
            is unknown, which leaves the kernels to TensorFlow.
    """
    if os.environ.get(SWITCH) == "off":
        for name in _chosen():  # by the process that started this one
            _choose(name, None)
        return
    keep_freed_memory()
    _choose(LOG_LEVEL, "3")
    if "tensorflow" not in sys.modules:
        threads = cpu_limit()
        for name in THREADS:
            _choose(name, str(threads) if threads else None)
        _choose(KERNELS, preferred_kernels(work))


def work_of(backbone: str, width: int = 64) -> str:
    """Return the kind of work of training a ResNet, from its name and the channels of its stem."""
    return OTHER if backbone == "resnet18" or width < 64 else LARGE_TRAINING


def preferred_kernels(work: str | None) -> str | None:
    """Return the best `TF_ENABLE_ONEDNN_OPTS` for a kind of work: "0", "1", or None for TensorFlow's choice."""
    flags = cpu_flags()
    if work is None or not flags or flags & ONEDNN_FLAGS:
        return None
    return "0" if work == LARGE_TRAINING else "1"


def tell_if_slow(work: str) -> None:
    """Log a warning, once, where TensorFlow was imported with kernels that are slower for a kind of work."""
    preferred = preferred_kernels(work)
    chosen_by_user = KERNELS in os.environ and KERNELS not in _chosen()
    if preferred in (None, os.environ.get(KERNELS, "0")) or chosen_by_user or os.environ.get(SWITCH) == "off":
        return
    if work not in _warned:
        _warned.add(work)
        logger.warning(
            "On this processor this network trains faster with the environment variable %s=%s, which has to be set "
            "before TensorFlow is imported, and TensorFlow is imported already. train.py sets it by itself",
            KERNELS,
            preferred,
        )


def keep_freed_memory() -> bool:
    """Make glibc keep freed large blocks; return whether it does. Other C libraries are left as they are."""
    tuned = "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")
    if tuned or any(name in os.environ for name in MEMORY) or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    largest = 2**31 - 1  # C int
    # Older versions of glibc accept at most 32 MB as the size from which a block gets its own mapping.
    mapped = mallopt(M_MMAP_THRESHOLD, largest) or mallopt(M_MMAP_THRESHOLD, 32 << 20)
    return bool(mapped and mallopt(M_TRIM_THRESHOLD, largest))


def cpu_limit(root: str | Path = "/sys/fs/cgroup", own: str | Path = "/proc/self/cgroup") -> int | None:
    """Return the number of CPUs that the cgroups of this process allow, where it is below the number visible.

    Args:
        root: str or Path. Folder of the cgroups, version 2 or 1.
        own: str or Path. File that lists the cgroups of this process, as ID:CONTROLLERS:PATH.

    Returns:
        The number, rounded up; None where there is no such limit.
    """
    lines = ["0::/", "1:cpu:/"]  # those of a container, whose own list may have the host's paths
    with contextlib.suppress(OSError):  # not Linux
        lines += Path(own).read_text().splitlines()
    folders: set[Path] = set()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            base, inside = Path(root, "cpu" if controllers else ""), Path(path.strip("/"))
            folders |= {base / part for part in (inside, *inside.parents)}
    limits = [math.ceil(limit) for folder in folders if (limit := _quota(folder))]
    seen = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(limits) if seen and limits and min(limits) < seen else None


def cpu_flags() -> set[str]:
    """Return the flags of an x86 processor as named by Linux, such as "avx2"; empty where they cannot be read."""
    return set(_cpuinfo("flags").split())


def processor() -> str:
    """Describe the processor for a benchmark: its name, widest vector unit, and whether oneDNN is on."""
    flags = cpu_flags()
    widest = next((f for f in ("amx_tile", "avx512_bf16", "avx512_vnni", "avx512f", "avx2") if f in flags), "no AVX2")
    onednn = os.environ.get(KERNELS, "1" if flags & ONEDNN_FLAGS else "0") == "1"
    name = _cpuinfo("model name") or platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} CPUs, {widest}, oneDNN {'on' if onednn else 'off'}"


def _quota(folder: Path) -> float | None:
    """CPUs that a cgroup may use; None where there is no limit."""
    try:
        if (folder / "cpu.max").exists():  # version 2
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return max(0, int(quota)) / int(period) or None
    except (OSError, ValueError, ZeroDivisionError):  # "max"
        return None


def _cpuinfo(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == field), "")


def _chosen() -> dict[str, str]:
    """{variable: value} of variables set here and not changed since."""
    pairs = (pair.split("=", 1) for pair in os.environ.get(CHOSEN, "").split(",") if "=" in pair)
    return {name: value for name, value in pairs if os.environ.get(name) == value}


def _choose(name: str, value: str | None) -> None:
    """Set a variable that the user has not set, or, with None, undo what was set here."""
    chosen = _chosen()
    if name in os.environ and name not in chosen:
        return
    chosen.pop(name, None)
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = chosen[name] = value
    os.environ[CHOSEN] = ",".join(f"{name}={value}" for name, value in chosen.items())
