"""The compatibility table: every feature that meets a sharded cache, and who serves it.

Start-up validation walks it (`verdict.py`), ``python -m sglang_helix compatibility`` prints it, and
every row has its test.
"""

from __future__ import annotations

from sglang_helix.srt.compatibility.row import Row
from sglang_helix.srt.compatibility.rows.caches import CACHES
from sglang_helix.srt.compatibility.rows.drafts import DRAFTS
from sglang_helix.srt.compatibility.rows.exchanges import EXCHANGES
from sglang_helix.srt.compatibility.rows.execution import EXECUTION
from sglang_helix.srt.compatibility.rows.hybrids import HYBRIDS
from sglang_helix.srt.compatibility.rows.models import MODELS
from sglang_helix.srt.compatibility.rows.parallel import PARALLEL
from sglang_helix.srt.compatibility.rows.serving import SERVING
from sglang_helix.srt.compatibility.rows.transfers import TRANSFERS
from sglang_helix.srt.compatibility.rows.weights import WEIGHTS
from sglang_helix.srt.compatibility.rows.windows import WINDOWS

# By what the rows of a group speak of, as the page heads them.
GROUPS: dict[str, tuple[Row, ...]] = {
    "Requests and batches": SERVING,
    "Graphs, compilation and passes": EXECUTION,
    "Other parallelism, and machines": PARALLEL,
    "The exchange": EXCHANGES,
    "The cache": CACHES,
    "Speculative decoding": DRAFTS,
    "Prefill-decode disaggregation": TRANSFERS,
    "Weights": WEIGHTS,
    "Kinds of attention": MODELS,
    "Sliding windows": WINDOWS,
    "Recurrent states": HYBRIDS,
}
TABLE: tuple[Row, ...] = tuple(row for rows in GROUPS.values() for row in rows)
