"""Who serves a server: the series, SGLang as it is, or nobody. The one decision, and its readers.

Three verdicts on a sharded cache. *works*: every row in use is proven, and the ranks install the
serve stage. *own*: a row in use is SGLang's own affair; the series leaves resolution and ranks
alone. *Refused*: start-up stops. Precedence: what is refused for SGLang too ends every start; own
beside works is own; a refusal that speaks of the series' code alone holds where the series serves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from sglang_helix.srt.compatibility.row import Row
from sglang_helix.srt.compatibility.rows.beside_own import BESIDE_OWN, ONLY_THE_SERIES
from sglang_helix.srt.compatibility.situation import Situation, situation_of
from sglang_helix.srt.compatibility.table import TABLE

Stage = Literal["launch", "serve", "transfer"]

_VERDICT = "_helix_verdict"


@dataclass(frozen=True)
class Verdict:
    """kind: whole (no sharded cache), works or own. features: rows that make it SGLang's own."""

    kind: Literal["whole", "works", "own"]
    features: tuple[str, ...] = ()


def verdict_of(server_args: Any) -> Verdict:
    """Who serves what these arguments ask for. Decided once; the record's pickled form keeps it.

    To be asked after the first step of resolution, which decides K. What makes a server SGLang's
    own are inputs: flags, the model and the machine, nothing that later steps decide.
    """
    from sglang.srt.arg_groups.overrides import resolved_view

    verdict = getattr(server_args, _VERDICT, None)
    if verdict is None:
        sharded = resolved_view(server_args).dcp_size > 1
        verdict = decide(situation_of(server_args)) if sharded else Verdict("whole")
        setattr(server_args, _VERDICT, verdict)
    return verdict


def stages_of(server_args: Any) -> frozenset[Stage]:
    """The stages of a rank that runs with resolved arguments.

    A plain prefill server sends to sharded decode servers, so it needs the stage of transfers too.
    """
    from sglang.srt.arg_groups.overrides import resolved_view

    kind, view = verdict_of(server_args).kind, resolved_view(server_args)
    stages: set[Stage] = {"launch"}
    if kind == "works":
        stages.add("serve")
    disaggregated = view.disaggregation_mode not in ("null", None)
    if kind != "own" and disaggregated and view.disaggregation_transfer_backend == "mooncake":
        stages.add("transfer")
    return frozenset(stages)


def decide(situation: Situation) -> Verdict:
    """works or own, for a sharded cache that starts."""
    own = tuple(row.feature for row in TABLE if row.status == "own" and row.in_use(situation))
    return Verdict("own", own) if own else Verdict("works")


def refusals(situation: Situation, verdict: Verdict) -> list[str]:
    """Every reason not to start; empty where it may."""
    if verdict.kind == "whole":
        return []
    if verdict.kind == "works":
        return _refusals(situation, (row for row in TABLE if row.status == "refused"))
    hopeless = tuple(row for row in TABLE if row.status == "refused" and row.fails_alone)
    return _refusals(situation, (*hopeless, *BESIDE_OWN), verdict.features)


def refusals_of_flags(situation: Situation, verdict: Verdict) -> list[str]:
    """Of `refusals`, what only the series has: asked before SGLang's steps meet such values."""
    if verdict.kind != "own":
        return []
    return _refusals(situation, ONLY_THE_SERIES, verdict.features)


def _refusals(
    situation: Situation, rows: Iterable[Row], features: tuple[str, ...] = ()
) -> list[str]:
    return [reason for row in rows if (reason := row.refusal(situation, features))]


def announcement(verdict: Verdict) -> str:
    """The log line of a server that SGLang serves by itself."""
    return (
        f"sglang-helix: SGLang serves this by its own --dcp-size ({', '.join(verdict.features)}), "
        "as without the series, which has not proven it and is not installed in the ranks; "
        "--attn-tp-size, --dcp-replicate-v-proj and --dcp-comm-backend symm do not apply."
    )
