"""Set up the process before TensorFlow is imported: its CPU kernels, memory, threads and log level.

Everything here is a default: a variable that is set in the environment wins, and `RETINANET_KERAS_RUNTIME=off` leaves
the process as it is. Importing the package applies `set_up()`; commands, which know what they will run, call it again
with that.

Kernels. TensorFlow has two sets for x86-64 CPUs, its own and oneDNN's, and reads `TF_ENABLE_ONEDNN_OPTS` once, when it
is imported. Where a processor has AVX-512 VNNI, AVX-512 BF16 or AMX it chooses oneDNN. Elsewhere neither is always
faster: oneDNN's are in small networks and in exported graphs, TensorFlow's own in training a ResNet-50 or larger, and
by two on a single image where the weights are variables. `benchmarks/environment.py` measures this.

Memory. TensorFlow allocates the output of each operation anew, and glibc returns large blocks to the system at once:
their pages are mapped and cleared again in each step. Here glibc keeps them.

Threads. TensorFlow starts as many as the machine has CPUs, in a container that may use fewer, too.
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
CHOSEN = "RETINANET_KERAS_CHOSEN"  # what was set here, and not by the user: processes that this one starts see it
KERNELS = "TF_ENABLE_ONEDNN_OPTS"
LOG_LEVEL = "TF_CPP_MIN_LOG_LEVEL"
THREADS = ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")
MEMORY = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")
ONEDNN_FLAGS = {"avx512_vnni", "avx512_bf16", "amx_tile"}  # with one of them TensorFlow turns oneDNN on by itself
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGE_TRAINING, OTHER = "large training", "other"  # what there is to choose kernels for

logger = logging.getLogger("retinanet_keras")
_told: set[str] = set()


def set_up(work: str | None = None) -> None:
    """Apply the defaults that fit this machine. To be called before TensorFlow is imported.

    Args:
        work: LARGE_TRAINING, the training of a ResNet-50 or larger; OTHER, anything else that commands run; None:
            unknown, which leaves the kernels to TensorFlow.
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
    """The kind of work that training a ResNet is, by its name and the channels of its stem."""
    return OTHER if backbone == "resnet18" or width < 64 else LARGE_TRAINING


def preferred_kernels(work: str | None) -> str | None:
    """What `TF_ENABLE_ONEDNN_OPTS` should be for some work: "0", "1", or None where TensorFlow's choice is right."""
    flags = cpu_flags()
    if work is None or not flags or flags & ONEDNN_FLAGS:
        return None
    return "0" if work == LARGE_TRAINING else "1"


def tell_if_slow(work: str) -> None:
    """Log once where TensorFlow was imported with kernels that are slower for some work, and what to do about it."""
    preferred = preferred_kernels(work)
    chosen_by_user = KERNELS in os.environ and KERNELS not in _chosen()
    if preferred in (None, os.environ.get(KERNELS, "0")) or chosen_by_user or os.environ.get(SWITCH) == "off":
        return
    if work not in _told:
        _told.add(work)
        logger.warning(
            "On this processor this network trains faster with the environment variable %s=%s, which has to be set "
            "before TensorFlow is imported; TensorFlow runs already. train.py sets it by itself", KERNELS, preferred,
        )  # fmt: skip


def keep_freed_memory() -> bool:
    """Have glibc keep the large blocks that are freed; whether it does. Other C libraries are left as they are."""
    tuned = "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")
    if tuned or any(name in os.environ for name in MEMORY) or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    most = 2**31 - 1  # of a C int
    # Older versions of glibc take no more than 32 MB as the size from which a block is mapped for itself.
    mapped = mallopt(M_MMAP_THRESHOLD, most) or mallopt(M_MMAP_THRESHOLD, 32 << 20)
    return bool(mapped and mallopt(M_TRIM_THRESHOLD, most))


def cpu_limit(root: str | Path = "/sys/fs/cgroup", own: str | Path = "/proc/self/cgroup") -> int | None:
    """The CPUs that this process may use by its cgroup and those above it, where they are fewer than it sees.

    Args:
        root: where the cgroups are, of version 2 or 1.
        own: lists the process's own, as ID:CONTROLLERS:PATH.

    Returns:
        their number, rounded up; None: no such limit.
    """
    lines = ["0::/", "1:cpu:/"]  # those of a container, which may be told the machine's names of them
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
    """The features of an x86 processor in Linux's words, such as "avx2"; empty where they cannot be read."""
    return set(_cpuinfo("flags").split())


def processor() -> str:
    """The processor's name, its widest vector unit and whether oneDNN is on, for figures that have to name them."""
    flags = cpu_flags()
    widest = next((f for f in ("amx_tile", "avx512_bf16", "avx512_vnni", "avx512f", "avx2") if f in flags), "no AVX2")
    onednn = os.environ.get(KERNELS, "1" if flags & ONEDNN_FLAGS else "0") == "1"
    name = _cpuinfo("model name") or platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} CPUs, {widest}, oneDNN {'on' if onednn else 'off'}"


def _quota(folder: Path) -> float | None:
    """CPUs that a cgroup may use; None: as many as there are."""
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
    """{variable: value} of what was set here and has not been changed since."""
    pairs = (pair.split("=", 1) for pair in os.environ.get(CHOSEN, "").split(",") if "=" in pair)
    return {name: value for name, value in pairs if os.environ.get(name) == value}


def _choose(name: str, value: str | None) -> None:
    """Set a variable that the user has not set, or, with None, take back what was set here before."""
    chosen = _chosen()
    if name in os.environ and name not in chosen:
        return
    chosen.pop(name, None)
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = chosen[name] = value
    os.environ[CHOSEN] = ",".join(f"{name}={value}" for name, value in chosen.items())
