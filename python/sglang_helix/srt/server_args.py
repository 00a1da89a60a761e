"""Resolution and validation of the layout's flags. Extends `server_args.py` and `arg_groups/`.

Each function here wraps one step of SGLang's resolution: ``fn(server_args, previous)``.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping
from typing import Any

from sglang_helix.srt.compatibility.situation import (
    Situation,
    attn_tp_size_of,
    replicates_v_proj,
    situation_of,
)
from sglang_helix.srt.compatibility.verdict import (
    announcement,
    decide,
    refusals,
    refusals_of_flags,
    verdict_of,
)
from sglang_helix.srt.configs.model_config import sharded_heads, state_heads
from sglang_helix.srt.distributed.topology import Layout, LayoutError, layout_of, ranks_of_replica
from sglang_helix.srt.layers.attention.adapters import Adapter, adapter, serving
from sglang_helix.srt.layers.attention.measured import faster, heads_name

logger = logging.getLogger(__name__)

Step = Callable[[Any], None]


def add_comm_backends(result: None, parser: argparse.ArgumentParser) -> None:
    """After `ServerArgs.add_cli_args`: the series' own choices of `--dcp-comm-backend`."""
    flag = parser._option_string_actions["--dcp-comm-backend"]
    for name, what in _own_comm_backends().items():
        flag.choices = [*(flag.choices or ()), name]
        flag.help = f"{flag.help or ''} sglang-helix adds '{name}' ({what})."


def _own_comm_backends() -> dict[str, str]:
    """The exchanges that SGLang does not have, and what they are."""
    from sglang_helix.srt.layers.dcp.exchange import BACKENDS

    return {name: backend.help for name, backend in BACKENDS.items() if backend.help}


def resolve_attn_tp_size(server_args: Any, previous: Step) -> None:
    """`handle_deprecated_dp_attention`, the first step: A becomes K and replicated queries.

    With `--no-dcp-replicate-q-proj`, which is faster for some models and batches, K alone.
    """
    from sglang.srt.arg_groups.overrides import declare_resolution, resolved_view

    attn_tp_size, view = attn_tp_size_of(server_args), resolved_view(server_args)
    replicas = attention_replicas(view)
    if view.dcp_size > 1:
        ranks_of_replica(view.tp_size, replicas)
    if attn_tp_size is not None:
        layout = layout_of(view.tp_size, attn_tp_size, view.dcp_size, replicas)
        if layout.kvp_size > 1:
            gathers = server_args._raw_input.get("dcp_replicate_q_proj") is False
            declare_resolution(
                server_args,
                "sglang_helix",
                dcp_size=layout.kvp_size,
                dcp_replicate_q_proj=not gathers,
            )
    previous(server_args)


def attention_replicas(view: Any) -> int:
    """Replicas of attention, of arguments whose former spelling may not be resolved yet."""
    if view.enable_dp_attention and view.attn_dp_size == 1:
        return int(view.dp_size)
    return int(view.attn_dp_size)


def resolve_comm_backend(server_args: Any, previous: Step) -> None:
    """`handle_decode_context_parallelism`: layout, heads and the communication backend."""
    from sglang.srt.arg_groups.overrides import declare_resolution, resolved_view

    view = resolved_view(server_args)
    if view.dcp_size <= 1:
        previous(server_args)
        if view.dcp_comm_backend in _own_comm_backends():  # SGLang refuses its own
            raise ValueError(
                f"--dcp-comm-backend {view.dcp_comm_backend} exchanges between the ranks "
                "that split a cache, and here none do: give --dcp-size or --attn-tp-size too, or "
                "leave the flag out."
            )
        if replicates_v_proj(server_args):
            raise ValueError(
                "--dcp-replicate-v-proj is for ranks that split a cache, and here none do: give "
                "--dcp-size or --attn-tp-size too, or leave the flag out."
            )
        return
    verdict = verdict_of(server_args)
    if verdict.kind == "own":
        _raise(refusals_of_flags(situation_of(server_args), verdict))
        previous(server_args)
        return
    if view.dcp_replicate_q_proj:
        # Upstream replicates with a2a only; the series with every exchange. Hide it for the step.
        declare_resolution(server_args, "sglang_helix", dcp_replicate_q_proj=None)
    previous(server_args)
    if view.dcp_replicate_q_proj:
        declare_resolution(server_args, "sglang_helix", dcp_replicate_q_proj=True)
    situation = situation_of(server_args)
    _check_heads(situation)
    _keep_states_of_prefixes(server_args, situation)
    named = server_args._raw_input.get("dcp_comm_backend")
    if situation.args.dcp_comm_backend == "fi_a2a" and not named:
        if not situation.mla:
            lacks = "serves MLA models only"
        elif situation.replicates_v_proj:
            lacks = "exchanges latents"
        elif situation.args.attn_dp_size > 1:
            lacks = "was not tried in attention replicas"
        else:
            return
        logger.info("--dcp-comm-backend: a2a in place of fi_a2a, which %s.", lacks)
        declare_resolution(server_args, "sglang_helix", dcp_comm_backend="a2a")


def _keep_states_of_prefixes(server_args: Any, situation: Situation) -> None:
    """Of hybrid models: have recurrent states snapshot at pages of the prefix tree.

    Where the user names no strategy, upstream's choice goes by the page size of the pool, which
    may be 1 where the tree's is K, and then fails.
    """
    from sglang.srt.arg_groups.overrides import (
        declare_resolution,
        supports_mamba_cache_extra_buffer,
    )

    args = situation.args
    if (
        situation.hybrid is not None
        and not args.disable_radix_cache
        and args.mamba_radix_cache_strategy == "auto"
        and supports_mamba_cache_extra_buffer(args, situation.model.hf_config)
    ):
        declare_resolution(server_args, "sglang_helix", mamba_radix_cache_strategy="extra_buffer")


def choose_attention_backend(server_args: Any, previous: Step) -> None:
    """`handle_attention_backend_compatibility`: where the user named no backend, one that works."""
    from sglang.srt.arg_groups.overrides import (
        attention_backends_of,
        declare_resolution,
        resolved_view,
    )

    view = resolved_view(server_args)
    unnamed = _unnamed_halves(server_args)
    if view.dcp_size > 1 and unnamed and verdict_of(server_args).kind == "works":
        situation = situation_of(server_args)
        defaults = _default_backends(server_args, situation, attention_backends_of(view))
        working = _backends_to_choose(situation, view.page_size)
        if failing := [defaults[half] for half in unnamed if defaults[half] not in working]:
            backend = working[0]
            logger.info(
                "--attention-backend %s: the default here, %s, does not serve --dcp-size %d.",
                backend,
                " and ".join(dict.fromkeys(map(str, failing))),
                view.dcp_size,
            )
            declare_resolution(
                server_args,
                "sglang_helix",
                attention_backend=backend,
                **{_HALVES[half]: None for half in unnamed},
            )
    previous(server_args)


def validate(server_args: Any, previous: Step) -> None:
    """`handle_model_capability_adjustments`: refuse what cannot be right, all reasons at once."""
    previous(server_args)
    check(server_args)


def check_launch(result: None, server_args: Any) -> None:
    """After `ServerArgs.check_server_args`, on the way to the ranks: the same for every launch.

    Arguments may have been resolved before SGLang loaded plugins, and so by SGLang alone.
    """
    from sglang.srt.arg_groups.overrides import attention_backends_of, resolved_view
    from sglang.srt.runtime_context import get_platform

    check(server_args)
    verdict = verdict_of(server_args)
    if verdict.kind == "own":
        logger.warning(announcement(verdict))
    elif verdict.kind == "works":
        situation, platform = situation_of(server_args), get_platform()
        backends = attention_backends_of(resolved_view(server_args))
        for half, backend in _halves(backends):
            if adapter(backend).is_unseen_on(platform, situation.attention):
                flag, _ = situation.sharded_by
                logger.warning("--%s-backend %s %s.", half, backend, _unseen(platform, flag))
        _advise_faster(situation, backends[1])


def check(server_args: Any) -> None:
    """Raise ValueError with every reason why resolved arguments must not be served.

    The launcher asks before it starts ranks, and every rank before it builds groups.
    """
    from sglang.srt.arg_groups.overrides import attention_backends_of, resolved_view

    view, attn_tp_size = resolved_view(server_args), attn_tp_size_of(server_args)
    ranks = view.tp_size // view.attn_dp_size
    if attn_tp_size is not None and attn_tp_size * view.dcp_size != ranks:
        raise ValueError(
            f"--attn-tp-size {attn_tp_size} was not heard: these arguments were resolved before "
            "plugins were loaded. Call sglang.srt.plugins.load_plugins() before you build a parser "
            "or ServerArgs."
        )
    verdict = verdict_of(server_args)
    if verdict.kind == "whole":
        return
    situation = situation_of(server_args)
    reasons = refusals(situation, verdict)
    if verdict.kind == "works":
        if decide(situation) != verdict:
            reasons.append(
                "SGLang's resolution turned on what only its own --dcp-size serves "
                f"({', '.join(decide(situation).features)}): ask for it by its flag."
            )
        _check_heads(situation)
        reasons += _backend_refusals(situation, attention_backends_of(view), server_args._raw_input)
    _raise(reasons)


def _raise(reasons: list[str]) -> None:
    if reasons:
        raise ValueError("\n".join(reasons))


def _check_heads(situation: Situation) -> None:
    if situation.args.attn_dp_size > 1:
        return  # a row of the table says what fits in a replica
    Layout(situation.args.tp_size, situation.args.dcp_size).check_heads(
        sharded_heads(situation.model),
        1 if situation.mla else situation.model.get_total_num_kv_heads(),
        decoupled=situation.attn_tp_size is not None,
    )
    ranks = situation.args.tp_size
    for heads in state_heads(situation.model):
        if heads % ranks:
            raise LayoutError(
                f"--tp-size {ranks}: {heads} heads of this model's recurrent layers cannot be "
                f"split over {ranks} ranks, which would start and answer wrongly; use a smaller one"
            )


def _backends_to_choose(situation: Situation, page_size: int | None) -> list[str]:
    """Names of what serves the model and its cache here, in order of preference; see `_refusal`."""
    from sglang.srt.runtime_context import get_platform

    return [
        record.name
        for record in serving(situation.attention)
        if record.is_chosen_on(get_platform(), situation.attention)
        and not _refusal(record, situation, page_size)
    ]


def _unseen(platform: Any, flag: str) -> str:
    """What a backend lacks on a machine, SGLang's `get_platform()`."""
    major = platform.device_sm // 10
    return f"has not been seen on a GPU of compute capability {major}.x with {flag}"


def _backend_refusals(
    situation: Situation, backends: tuple[str, str], given: Mapping[str, Any]
) -> list[str]:
    """Why the prefill and the decode backend do not serve, where they do not.

    given: the user's arguments, by name.
    """
    from sglang.srt.runtime_context import get_platform

    platform, attention, (flag, size) = get_platform(), situation.attention, situation.sharded_by
    records = [record for record in serving(attention) if record.runs_on(platform, attention)]
    named = {given.get(name) for name in ("attention_backend", *_HALVES)}
    taken, page_size = situation.args.page_size, given.get("page_size")
    fit = {record.name: _refusal(record, situation, taken) for record in records}
    instead = ", ".join(one.name for one in records if not _refusal(one, situation, page_size))
    reasons = []
    for half, backend in _halves(backends):
        if refusal := fit.get(backend, ""):
            reasons.append(f"--{half}-backend {backend} {refusal}: use one of {instead}.")
        elif backend not in fit:
            reasons.append(
                f"--{half}-backend {backend} does not serve "
                f"{'MLA' if situation.mla else 'GQA or MHA'} with {flag} {size}: "
                f"use one of {instead}."
            )
        elif backend not in named and adapter(backend).is_unseen_on(platform, attention):
            seen = ", ".join(_backends_to_choose(situation, page_size))
            reasons.append(
                f"--{half}-backend {backend} {_unseen(platform, flag)}, and SGLang chose it: give "
                f"the flag to have it all the same, or with one of {seen}."
            )
    return reasons


def _advise_faster(situation: Situation, backend: str) -> None:
    """Say where another decode backend was measured to be faster for the heads of a rank."""
    from sglang.srt.runtime_context import get_platform

    platform, args, model = get_platform(), situation.args, situation.model
    # Measured were caches in bf16, keys and values of 128, and latents of 512 with a rope of 64.
    widths = (model.kv_lora_rank, model.qk_rope_head_dim) if situation.mla else (model.head_dim,)
    if not platform.is_cuda or args.kv_cache_dtype not in ("auto", "bfloat16", "bf16"):
        return
    if widths not in ((512, 64), (128,)):
        return
    layout = Layout(situation.attention_ranks, args.dcp_size)
    kv_heads = None if situation.mla else layout.kv_heads(model.get_total_num_kv_heads())
    heads = heads_name(sharded_heads(model) // layout.attn_tp_size, kv_heads)
    others = [
        record.name
        for record in serving(situation.attention)
        if record.runs_on(platform, situation.attention)
        and not record.is_unseen_on(platform, situation.attention)
    ]
    if found := faster(backend, others, heads, platform.device_sm // 10):
        logger.info(
            "--attention-backend %s decoded %.2f to %.2f times as fast as %s with the %s heads of "
            "this layout (%s, docs/benchmarks.md).",
            *(found.backend, found.least, found.most, backend, heads, found.device),
        )


def _halves(backends: tuple[str, str]) -> list[tuple[str, str]]:
    """What prefill and decode are called in the flags of their backends, and the backends."""
    if len(set(backends)) == 1:
        return [("attention", backends[0])]
    return list(zip(("prefill-attention", "decode-attention"), backends, strict=True))


def _refusal(record: Adapter, situation: Situation, page_size: int | None) -> str:
    """Why a backend cannot serve the cache and the drafts that are asked for; empty if it can.

    page_size: None where none was given: SGLang then takes one that the backend has.
    """
    args, (flag, size) = situation.args, situation.sharded_by
    what = f"for {'MLA' if situation.mla else 'GQA or MHA'} with {flag} {size}"
    cache = str(args.kv_cache_dtype)
    reason = record.refuses_fp8(situation.attention, e5m2=cache == "fp8_e5m2")
    if reason and cache.startswith("fp8"):
        return f"does not read --kv-cache-dtype {cache} {what} ({reason})"
    reason = record.no_drafts.get(situation.attention, "")
    if reason and args.speculative_algorithm:
        asked = f"--speculative-algorithm {args.speculative_algorithm}"
        return f"does not verify the drafts of {asked} {what} ({reason})"
    if (situation.windows or situation.cut_windows) and not record.windows:
        return f"does not attend sliding windows {what}"
    if record.pages and page_size not in (None, *record.pages):
        sizes = " or ".join(map(str, record.pages))
        return f"takes --page-size {sizes}, not {page_size}, {what}"
    return ""


# In the order of `attention_backends_of`.
_HALVES = ("prefill_attention_backend", "decode_attention_backend")


def _unnamed_halves(server_args: Any) -> list[int]:
    """Prefill (0) and decode (1) where the user named no attention backend."""
    named = server_args._raw_input
    if named.get("attention_backend"):
        return []
    return [half for half, name in enumerate(_HALVES) if not named.get(name)]


def _default_backends(
    server_args: Any, situation: Situation, decided: tuple[str | None, str | None]
) -> tuple[str | None, ...]:
    """Prefill and decode backends upstream would use: what it has decided, else its default."""
    from sglang.srt.arg_groups.model_override_base import get_default_attn_backend

    if all(decided):
        return decided
    default = get_default_attn_backend(server_args, situation.mla, situation.model)
    return tuple(backend or default for backend in decided)
