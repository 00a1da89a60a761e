"""What was seen of which attention backend, and where: one record a sighting.

From this table follow the matrix of docs/status.md and which adapters are taken by name alone
(`Adapter.unseen`). After a run: a record, or a word in one, and `python docs/render.py`.

Importing this module imports neither SGLang nor torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    from sglang_helix.srt.layers.attention.adapters import Attention

# A CPU runs stand-ins for the kernels, Triton's in its interpreter; test_conformance.py holds what
# it is to run. Ranks may share one H200; several GPUs are a rank's own each.
Place = Literal["CPU", "one H200", "several GPUs"]
# Decode from a captured graph (a CPU: with its metadata, refreshed in place), extend over a cached
# prefix, decode from an fp8 cache, a verify pass over trees of drafts.
Feature = Literal["graph", "extend", "fp8", "verify"]

PLACES: tuple[Place, ...] = get_args(Place)
FEATURES: tuple[Feature, ...] = get_args(Feature)


class Seen(NamedTuple):
    """A backend gave right results; with no features, what else is known of it there.

    how: what ran. On GPUs, where nothing else is said, servers in bf16 with CUDA graphs and the
        overlap schedule, compared with `transformers`.
    """

    backend: str
    attention: Attention
    place: Place
    features: tuple[Feature, ...]
    how: str


SEEN: tuple[Seen, ...] = (
    Seen(
        *("fa3", "GQA", "CPU", FEATURES),
        "SGLang's schedulers against `transformers`, and the conformance suite",
    ),
    Seen(
        *("fa3", "GQA", "one H200", FEATURES),
        "Llama-shaped `a2a`, `symm`; with HELIX_FA3_SCHEDULE=1 `a2a` and `symm` of 4; windows cut "
        "by owner (Gemma-3 `a2a`, Command-A `symm`), Qwen3-Next `a2a`; an fp8 cache with `symm`, "
        "scales of a checkpoint and without: no further from the oracle than one rank; n-gram "
        "drafts with `a2a`, verified from graphs",
    ),
    Seen(
        *("fa3", "GQA", "several GPUs", ("graph", "extend")),
        "two H200s, Llama-shaped `a2a`, `symm`, `--attn-tp-size 1`; `symm` of 4 "
        "ranks, two to a GPU, where prompts of one token leave three ranks empty; times per token. "
        "Four H200s: `symm` of 4; times per token. All without HELIX_FA3_SCHEDULE=1, by which a "
        "decode step's schedule is worked out once for all layers",
    ),
    Seen(
        *("fa3", "MLA", "CPU", ("graph", "extend", "verify")),
        "SGLang's schedulers against `transformers`, long prefixes un-absorbed at once and in "
        "chunks too, and the conformance suite",
    ),
    Seen(
        *("fa3", "MLA", "one H200", ("graph", "extend", "verify")),
        "DeepSeek-V2-shaped `symm`; long prefixes un-absorbed in chunks and n-gram drafts verified "
        "from graphs, `a2a`; MTP with `symm` of 4: right tokens, 42 right drafts where one rank "
        "had 37",
    ),
    Seen(
        *("fa3", "MLA", "several GPUs", ("graph", "extend")),
        "two H200s, DeepSeek-V2-shaped `a2a`, `symm`, `--attn-tp-size 1`; `symm` of 4 ranks, two "
        "to a GPU; times per token. Four H200s: `symm` of 4; times per token",
    ),
    Seen(
        *("fa4", "GQA", "CPU", ("graph", "extend", "verify")),
        "SGLang's schedulers against `transformers`, and the conformance suite",
    ),
    Seen(
        *("fa4", "MLA", "CPU", ("graph", "extend", "verify")),
        "SGLang's schedulers, told of a Blackwell GPU, against `transformers`, and the conformance "
        "suite",
    ),
    Seen(
        *("flashinfer", "GQA", "CPU", FEATURES),
        "SGLang's schedulers against `transformers`, and the conformance suite: FlashInfer's own "
        "wrappers on a stand-in for the modules that they compile",
    ),
    Seen(
        *("flashinfer", "GQA", "several GPUs", ("graph", "extend")),
        "two H200s, Llama-shaped `a2a`, `--attn-tp-size 1`; four H200s, `symm` of 4, where prompts "
        "of one token leave three ranks empty. Since then 6 of 8 servers whose ranks shared an "
        "H200 gave wrong tokens behind a continued request: plans overtook each other, which is "
        "mended and not run on a GPU again",
    ),
    Seen(
        *("flashinfer", "MLA", "CPU", ("extend", "verify")),
        "upstream's class on stand-ins, SGLang's schedulers against `transformers`, long prefixes "
        "un-absorbed at once and in chunks too; its verify pass by the conformance suite",
    ),
    Seen(
        *("flashinfer", "MLA", "one H200", ("graph", "extend")),
        "DeepSeek-V2-shaped `ag_rs`, `a2a`, `symm`; `symm` of 4 ranks, with empty shards. A prefix "
        "in chunks gave a token that transformers in bf16 gives too, and fp32 does not",
    ),
    Seen(
        *("flashinfer", "MLA", "several GPUs", ("graph", "extend")),
        "four H200s, DeepSeek-V2-shaped `symm` of 4; times per token of DeepSeek-V2-Lite's shape, "
        "`a2a` and `symm` on two H200s, `symm` on four H100s",
    ),
    Seen(
        *("flashmla", "MLA", "CPU", FEATURES),
        "SGLang's schedulers against `transformers`, long prefixes un-absorbed at once and in "
        "chunks too, and the conformance suite; its prefill by FlashInfer's wrappers",
    ),
    Seen(
        *("flashmla", "MLA", "one H200", ("graph", "extend")),
        "DeepSeek-V2-shaped `symm` of 2 and of 4 ranks, prompts of one token among them; long "
        "prefixes un-absorbed in chunks, `a2a`",
    ),
    Seen(
        *("flashmla", "MLA", "several GPUs", ("graph", "extend")),
        "two H200s, DeepSeek-V2-shaped `a2a`, `--attn-tp-size 1`; four H200s, `symm` of 4, prompts "
        "of one token among them; times per token of DeepSeek-V2-Lite's shape, `symm` on two H200s",
    ),
    Seen(
        *("trtllm_mha", "GQA", "CPU", FEATURES),
        "SGLang's schedulers, told of a Blackwell GPU, against `transformers`, and the conformance "
        "suite",
    ),
    Seen(
        *("triton", "GQA", "CPU", FEATURES),
        "the conformance suite in the interpreter; servers under it against `transformers`, a few "
        "tokens, n-gram drafts too",
    ),
    Seen(
        *("triton", "GQA", "one H200", FEATURES),
        "Llama-shaped `ag_rs`, `a2a`, `symm`, `--attn-tp-size` 1 of 2 and 2 of "
        "4, and, with splits by multiprocessors, `symm` of 4; an fp8 cache (scale 1) with `a2a` "
        "and `symm` against one rank; n-gram drafts with `a2a`, without graphs and from graphs; "
        "EAGLE's chains with `a2a` from graphs; windows cut by owner (Gemma-3 `symm`, Command-A "
        "`a2a`), Qwen3-Next and Nemotron-H `a2a`",
    ),
    Seen(
        *("triton", "GQA", "several GPUs", ("graph", "extend")),
        "SGLang's custom all-reduce, Llama-shaped `symm` on 2 and 4 H100s, "
        "before splits went by multiprocessors",
    ),
    Seen(
        *("triton", "MLA", "CPU", FEATURES),
        "the conformance suite in the interpreter; a server under it against `transformers`, a "
        "few tokens",
    ),
    Seen(
        *("triton", "MLA", "one H200", ("graph", "extend", "verify")),
        "DeepSeek-V2-shaped `ag_rs`, `a2a`, `symm`, `--attn-tp-size` 1 of 2 and "
        "2 of 4; with splits by multiprocessors, `a2a`, `symm` and `symm` of 4; MTP's chains with "
        "`a2a` from graphs",
    ),
    Seen(
        *("triton", "MLA", "several GPUs", ("graph", "extend")),
        "DeepSeek-V2-shaped `symm` on 2 H200s, before splits went by multiprocessors",
    ),
    Seen(
        *("torch_native", "GQA", "CPU", ("extend", "verify")),
        "whole servers against `transformers`; it captures nothing, and a GPU is not its place",
    ),
    Seen(
        *("torch_native", "MLA", "CPU", ("extend", "verify")),
        "whole servers against `transformers`",
    ),
)


def seen(backend: str, attention: Attention, place: Place) -> set[Feature]:
    """What gave right results there."""
    return {
        feature
        for record in SEEN
        if record[:3] == (backend, attention, place)
        for feature in record.features
    }


def seen_on_a_gpu(backend: str, attention: Attention) -> bool:
    """Whether it has served on one: prompts, and decode from graphs."""
    return any(
        seen(backend, attention, place) >= {"graph", "extend"} for place in PLACES if place != "CPU"
    )
