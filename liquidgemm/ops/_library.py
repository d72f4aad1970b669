"""Loads the two compiled libraries and says why the Hopper kernel can or cannot run here.

``_C_host.so`` holds the ops of the CPU and is always needed. ``_C_cuda.so`` holds the
kernels; it refers to symbols that only a CUDA build of torch exports, so it is loaded only there.
Loading either needs neither a GPU nor a driver, and never initializes CUDA.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch

_PACKAGE = Path(__file__).parents[1]
HOST_LIBRARY = _PACKAGE / "_C_host.so"
CUDA_LIBRARY = _PACKAGE / "_C_cuda.so"
HOPPER = (9, 0)

_REBUILD = "reinstall liquidgemm, or run `python setup.py build_ext --inplace` in a source checkout"


@dataclass(frozen=True)
class LibraryStatus:
    """What is loaded and whether the Hopper kernel can run in this process.

    Attributes:
        host_library: path of the loaded CPU library.
        cuda_library: path of the loaded CUDA library, or None.
        cuda_available: True if the CUDA library is loaded and a visible GPU has compute
            capability 9.0.
        reason: one sentence that says why the kernel can or cannot run here.
    """

    host_library: Path
    cuda_library: Path | None
    cuda_available: bool
    reason: str


@functools.cache
def load_libraries() -> str | None:
    """Load, once, the host library and, where torch has CUDA, the CUDA library.

    Returns:
        None if the CUDA library is loaded, else why it is not. That is no error here: the CPU path
        works without it, and every op that is called on a CUDA tensor gives the reason.

    Raises:
        ImportError: the host library is missing, does not load or is of an older version.
    """
    if not HOST_LIBRARY.exists():
        raise ImportError(f"liquidgemm: {HOST_LIBRARY} has not been built; {_REBUILD}")
    try:
        torch.ops.load_library(str(HOST_LIBRARY))
    except (OSError, RuntimeError) as error:
        raise ImportError(
            f"liquidgemm: {HOST_LIBRARY} does not load ({error}); {_REBUILD}"
        ) from error
    if not hasattr(torch.ops.liquidgemm_cpu, "kernels"):
        raise ImportError(f"liquidgemm: {HOST_LIBRARY} is of an older version; {_REBUILD}")
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if not CUDA_LIBRARY.exists():
        return f"{CUDA_LIBRARY} has not been built; {_REBUILD}"
    try:
        torch.ops.load_library(str(CUDA_LIBRARY))
    except (OSError, RuntimeError) as error:
        return f"{CUDA_LIBRARY} does not load ({error}); {_REBUILD}"
    return None


def hopper_devices() -> list[int]:
    """Indices of the visible GPUs with compute capability 9.0 (initializes CUDA)."""
    if not torch.cuda.is_available():
        return []
    return [
        index
        for index in range(torch.cuda.device_count())
        if torch.cuda.get_device_capability(index) == HOPPER
    ]


def status() -> LibraryStatus:
    """The state of the libraries and GPUs; looks at the GPUs anew on each call."""
    problem = load_libraries()
    hopper = hopper_devices() if problem is None else []
    if hopper:
        name = torch.cuda.get_device_name(hopper[0])
        reason = f"The Hopper kernel runs on cuda:{hopper[0]} ({name}, compute capability 9.0)."
    else:
        reason = f"The Hopper kernel cannot run here: {problem or _gpu_problem()}."
    return LibraryStatus(
        host_library=HOST_LIBRARY,
        cuda_library=CUDA_LIBRARY if problem is None else None,
        cuda_available=bool(hopper),
        reason=reason,
    )


def _gpu_problem() -> str:
    """Why a torch with CUDA has no GPU of compute capability 9.0, without a final full stop."""
    if torch.cuda.is_available():
        seen = (
            f"cuda:{index} ({torch.cuda.get_device_name(index)}) has compute capability "
            "{}.{}".format(*torch.cuda.get_device_capability(index))
            for index in range(torch.cuda.device_count())
        )
        return "it needs compute capability 9.0, and " + ", ".join(seen)
    try:
        # Its message tells a missing driver from one that is too old and from no visible GPU.
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().splitlines()[0].split(". ")[0].rstrip(".")
    return "torch sees no CUDA device"
