"""Rows: the cache, its pages, prefixes and copies."""

from __future__ import annotations

from sglang_helix.srt.compatibility.conditions import flag, not_of_mla, of_mla, unlike
from sglang_helix.srt.compatibility.row import WITHOUT, Row
from sglang_helix.srt.compatibility.situation import Situation


def _hnd_layout(situation: Situation) -> object | None:
    from sglang.srt.environ import envs

    return bool(envs.SGLANG_USE_HND_KVCACHE.get()) or None


def _storage_of_nobody(situation: Situation) -> object | None:
    asked = situation.args.hicache_storage_backend
    return None if asked == "file" or (situation.mla and asked == "mooncake") else asked


CACHES: tuple[Row, ...] = (
    Row("prefix cache", "--disable-radix-cache off", "works", "end-to-end matrix, hits asserted"),
    Row("no prefix cache", "--disable-radix-cache", "works", "answers are transformers', MLA"),
    Row("page size", "--page-size", "works", "end-to-end matrix, pages of 1 and 64"),
    Row(
        "FP4 and MXFP8 caches",
        "--kv-cache-dtype",
        "refused",
        "their scales are not stored by owner",
        "Use auto, bfloat16 or an fp8 type",
        unlike("kv_cache_dtype", "auto", "bf16", "bfloat16", "fp8_e4m3", "fp8_e5m2"),
    ),
    Row(
        "head-major cache layout",
        "SGLANG_USE_HND_KVCACHE",
        "refused",
        "the owner's rows are written token by token",
        "Unset the variable",
        _hnd_layout,
    ),
    Row(
        "unified memory pool of MLA models",
        "--enable-unified-memory",
        "own",
        "on flashinfer, trtllm_mla and cutedsl_mla",
        given=of_mla(flag("enable_unified_memory")),
        alone="serves",
        proof="arg_groups/kv_cache_hook.py",
    ),
    Row(
        "unified memory pool of GQA and MHA models",
        "--enable-unified-memory",
        "refused",
        "its write locations are translated before the owner of a row is known",
        WITHOUT,
        not_of_mla(flag("enable_unified_memory")),
        alone="refuses",
    ),
    Row(
        "upstream's KV cache sharding",
        "--enable-kv-cache-sharding",
        "refused",
        "the cache would be sharded twice",
        WITHOUT,
        flag("enable_kv_cache_sharding"),
        alone="refuses",
    ),
    Row(
        "hierarchical cache",
        "--enable-hierarchical-cache",
        "works",
        "answers from host copies are transformers', GQA and MLA, hits asserted",
    ),
    Row(
        "K, V and latents in files behind the hierarchical cache",
        "--hicache-storage-backend file",
        "works",
        "answers from files are transformers', hits asserted; a page of which one rank has no file "
        "ends everyone's prefix; files of another dtype or memory layout are not read",
    ),
    Row(
        "Mooncake behind the hierarchical cache of MLA models",
        "--hicache-storage-backend mooncake",
        "works",
        "answers from a stand-in for its store are transformers', hits asserted; pages of another "
        "dtype or memory layout are not read; no store of Mooncake's own was seen",
        alone="serves",
        proof="arg_groups/hicache_hook.py, managers/cache_controller.py",
    ),
    Row(
        "other storage behind the hierarchical cache",
        "--hicache-storage-backend",
        "refused",
        "no other store has a page format by owner",
        "Use file, or leave the flag out, copies on the host work",
        _storage_of_nobody,
        alone="refuses",
    ),
    Row(
        "LMCache",
        "--enable-lmcache",
        "refused",
        "it stores whole pages",
        WITHOUT,
        flag("enable_lmcache"),
        alone="refuses",
    ),
    Row(
        "HiSparse",
        "--enable-hisparse",
        "refused",
        "its host pages are not sharded",
        WITHOUT,
        flag("enable_hisparse"),
    ),
    Row(
        "FlexKV",
        "--enable-flexkv",
        "refused",
        "it stores whole pages",
        WITHOUT,
        flag("enable_flexkv"),
    ),
    Row(
        "external cache linker",
        "--enable-unified-cache-external-linker",
        "refused",
        "it transfers whole pages",
        WITHOUT,
        flag("enable_unified_cache_external_linker"),
    ),
    Row(
        "prefix caches of other plugins",
        "--radix-cache-backend",
        "refused",
        "they are not known to count in widened pages",
        WITHOUT,
        flag("radix_cache_backend"),
    ),
    Row("sessions", "/open_session", "works", "turns and branches equal plain TP, GQA and MLA"),
    Row(
        "streaming sessions",
        "--enable-streaming-session",
        "refused",
        "a session keeps slots between requests, which has not been tried",
        WITHOUT,
        flag("enable_streaming_session"),
    ),
    Row(
        "sessions in the prefix tree",
        "--enable-session-radix-cache",
        "refused",
        "a session keeps slots between requests, which has not been tried",
        WITHOUT,
        flag("enable_session_radix_cache"),
    ),
    Row(
        "cache canary",
        "--kv-canary",
        "refused",
        "it checks rows at widened slots, beyond the end of a sharded pool",
        WITHOUT,
        unlike("kv_canary", "none"),
    ),
)

# By a request to a server that runs, and so by request: `managers/scheduler.py`.
STORAGE: tuple[Row, ...] = tuple(
    row for row in CACHES if row.flag == "--hicache-storage-backend" and row.status != "works"
)
