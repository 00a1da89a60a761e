"""GPU attention kernels in plain torch, one level under the Python interfaces that SGLang calls.

So SGLang's attention backends, and the packages that they import, run unchanged on a CPU: what is
replaced is what those packages call on a GPU. A stand-in checks every call against the real
signature and against what the real kernel demands (dtypes, layouts, page ids), and follows it in
what it leaves behind: base of the LSE, requests without tokens, rows that nobody writes (NaN here).

The platform installs those that `VARIABLE` names before any attention backend is imported.
"""

import os
from collections.abc import Iterable
from importlib import import_module

#: Names of attention backends, separated by commas, whose kernels shall have stand-ins.
VARIABLE = "SGLANG_CPU_REFERENCE_STAND_INS"

#: The modules of this package that stand in for what an attention backend calls.
MODULES: dict[str, tuple[str, ...]] = {
    "fa3": ("flash_attention", "mla"),
    "fa4": ("flash_attention", "flash_attention_v4", "mla"),
    "flashinfer": ("flashinfer", "mla"),
    "flashmla": ("flash_mla", "flashinfer", "mla"),
    "trtllm_mha": ("flashinfer", "trtllm"),
}

_installed: set[str] = set()


def install(backends: Iterable[str] | None = None) -> None:
    """Install the stand-ins of these attention backends, by default of those the variable names.

    Idempotent. Raises ValueError for a backend that has none.
    """
    if backends is None:
        backends = filter(None, os.environ.get(VARIABLE, "").split(","))
    for backend in backends:
        if backend not in MODULES:
            raise ValueError(
                f"{VARIABLE}: no stand-ins for {backend!r}; there are {', '.join(MODULES)}"
            )
        for module in MODULES[backend]:
            if module not in _installed:
                import_module(f"{__name__}.{module}").install()
                _installed.add(module)
