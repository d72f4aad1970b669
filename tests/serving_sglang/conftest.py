"""For a machine without a GPU: the processes that SGLang starts have the stand-ins as well."""

import os
from pathlib import Path

HERE = Path(__file__).parent

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "SGLANG_USE_CPU_ENGINE": "1",
    "PYTHONPATH": os.pathsep.join(
        (*map(str, (HERE / "absent", HERE)), os.environ.get("PYTHONPATH", ""))
    ).rstrip(os.pathsep),
}
