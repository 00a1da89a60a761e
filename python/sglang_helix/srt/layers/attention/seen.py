"""What was seen of which attention backend and of all else, and where: one record a sighting.

From these tables follow the matrix of docs/status.md and which adapters are taken by name alone
(`Adapter.unseen`). After a run: a record, or a word in one, and `python docs/render.py`.

Importing this module imports neither SGLang nor torch.
"""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    from sglang_helix.srt.layers.attention.adapters import Attention

# A CPU runs stand-ins for the kernels, Triton's in its interpreter; test_conformance.py holds what
# it is to run. Ranks may share one H200; several GPUs are a rank's own each.
Place = Literal["CPU", "one H200", "several GPUs"]
# Decode from a captured graph (a CPU: its metadata, as replays read it), extend over a cached
# prefix, decode from an fp8 cache, a verify pass over trees of drafts.
Feature = Literal["graph", "extend", "fp8", "verify"]

PLACES: tuple[Place, ...] = get_args(Place)
FEATURES: tuple[Feature, ...] = get_args(Feature)

# Of the GPUs there, the major of their compute capability: H100s and H200s. Those of another
# generation are a place of their own.
MAJORS: dict[Place, int] = {"one H200": 9, "several GPUs": 9}


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
        "a server and SGLang's schedulers against `transformers`, and the conformance suite",
    ),
    Seen(
        *("fa3", "GQA", "one H200", FEATURES),
        "Llama-shaped `a2a`, `symm`, `symm` of 4; gpt-oss `a2a`; windows cut by owner (Gemma-3 "
        "`a2a`, Command-A `symm`, Gemma-2 `symm` with capped logits), Qwen3-Next `a2a`; an fp8 "
        "cache with `symm`, scales of a checkpoint and without: no further from the oracle than "
        "one rank; n-gram drafts with `a2a`, verified from graphs",
    ),
    Seen(
        *("fa3", "GQA", "several GPUs", FEATURES),
        "two H200s, Llama-shaped `a2a`, `symm`, `--attn-tp-size 1`; an fp8 cache with a "
        "checkpoint's scales, `symm`: no further from the oracle than one rank; Gemma-3 with "
        "windows cut by owner, `symm`; EAGLE's chains from graphs, "
        "`symm`, and `a2a` with a page 0 of NaN, which padding reads; `symm` of 4 "
        "ranks, two to a GPU, where prompts of one token leave three ranks empty; times per token, "
        "with a decode step's schedule for all layers too. Four H200s: `symm` of 4; times per "
        "token, before that schedule",
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
        "had 37, in both of two runs (in plain torch bf16 counts 37 to 43 without any sharding, by "
        "how its sums are cut; on a CPU in fp32 4 ranks count what plain torch does, 40, prompt by "
        "prompt)",
    ),
    Seen(
        *("fa3", "MLA", "several GPUs", ("graph", "extend", "verify")),
        "two H200s, DeepSeek-V2-shaped `a2a`, `symm`, `--attn-tp-size 1`; n-grams from graphs, "
        "`a2a`, with a page 0 of NaN, which padding reads; `symm` of 4 ranks, two "
        "to a GPU; times per token. Four H200s: `symm` of 4; times per token",
    ),
    Seen(
        *("fa4", "GQA", "CPU", ("graph", "extend", "verify")),
        "SGLang's schedulers against `transformers`, and the conformance suite",
    ),
    Seen(*("fa4", "GQA", "one H200", ()), "its decode timed, every output checked"),
    Seen(
        *("fa4", "GQA", "several GPUs", ("graph", "extend")),
        "two H200s, Llama-shaped `a2a`, `symm`, `--attn-tp-size 1`; `symm` of 4 ranks on one of "
        "them, where prompts of one token leave three ranks empty",
    ),
    Seen(
        *("fa4", "MLA", "CPU", ("graph", "extend", "verify")),
        "a server and SGLang's schedulers, told of a Blackwell GPU, against `transformers`, and "
        "the conformance suite",
    ),
    Seen(
        *("flashinfer", "GQA", "CPU", FEATURES),
        "a server and SGLang's schedulers against `transformers`, and the conformance suite: "
        "FlashInfer's own wrappers on a stand-in for the modules that they compile",
    ),
    Seen(
        *("flashinfer", "GQA", "one H200", ("graph", "extend", "verify")),
        "Llama-shaped `a2a`, `symm`, `--attn-tp-size 1` and `symm` of 4, all four at once on the "
        "GPU, which gave wrong tokens before plans waited for each other's copies; n-gram drafts "
        "verified from graphs; since a chunk's keys and values are read where they lie, as plain "
        "TP reads them, `symm` of 4",
    ),
    Seen(
        *("flashinfer", "GQA", "several GPUs", FEATURES),
        "two H200s, Llama-shaped `a2a`, `symm`, `--attn-tp-size 1`; an fp8 cache with a "
        "checkpoint's scales, `symm`: no further from the oracle than one rank; EAGLE's chains "
        "from graphs, `symm`, and `a2a` with a page 0 of NaN, which padding reads; four "
        "H200s, `symm` of 4, where prompts of one token leave three ranks empty",
    ),
    Seen(
        *("flashinfer", "MLA", "CPU", ("extend", "verify")),
        "upstream's class on stand-ins, SGLang's schedulers against `transformers`, long prefixes "
        "un-absorbed at once and in chunks too; its verify pass by the conformance suite",
    ),
    Seen(
        *("flashinfer", "MLA", "one H200", ("graph", "extend", "verify")),
        "DeepSeek-V2-shaped `ag_rs`, `a2a`, `symm`; `symm` of 4 ranks, with empty shards; long "
        "prefixes un-absorbed in chunks, `a2a`; MTP's chains with `symm` of 4 from graphs",
    ),
    Seen(
        *("flashinfer", "MLA", "several GPUs", ("graph", "extend", "verify")),
        "two H200s, DeepSeek-V2-shaped `a2a`, n-grams from graphs too, also with a page 0 of NaN, "
        "which padding reads; Kimi-Linear `a2a`; four H200s, DeepSeek-V2-shaped `symm` of 4; times "
        "per token of DeepSeek-V2-Lite's shape, `a2a` and `symm` on two H200s, `symm` on four "
        "H100s",
    ),
    Seen(
        *("flashmla", "MLA", "CPU", FEATURES),
        "a server and SGLang's schedulers against `transformers`, long prefixes un-absorbed at "
        "once and in chunks too, and the conformance suite; its prefill by FlashInfer's wrappers",
    ),
    Seen(
        *("flashmla", "MLA", "one H200", FEATURES),
        "DeepSeek-V2-shaped `symm` of 2 and of 4 ranks, prompts of one token among them; long "
        "prefixes un-absorbed in chunks, `a2a`; an fp8 cache with `symm`: no further from the "
        "oracle than one rank; MTP's chains with `a2a` from graphs",
    ),
    Seen(
        *("flashmla", "MLA", "several GPUs", FEATURES),
        "two H200s, DeepSeek-V2-shaped `a2a`, `symm`, `--attn-tp-size 1`; an fp8 cache with a "
        "checkpoint's scales, `symm`: no further from the oracle than one rank; n-grams from "
        "graphs, `a2a`, with a page 0 of NaN, which padding reads; four H200s, `symm` of 4, "
        "prompts of one token among them; times per token of DeepSeek-V2-Lite's shape, `symm` on "
        "two H200s",
    ),
    Seen(
        *("trtllm_mha", "GQA", "CPU", FEATURES),
        "a server and SGLang's schedulers, told of a Blackwell GPU, against `transformers`, and "
        "the conformance suite",
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
        "`a2a`), gpt-oss `symm`, Qwen3-Next `a2a` and `symm`, Nemotron-H `a2a`",
    ),
    Seen(
        *("triton", "GQA", "several GPUs", ("graph", "extend", "verify")),
        "two H200s, Llama-shaped `symm`; EAGLE's trees from graphs, `symm`, and without, "
        "`--attn-tp-size 1`, and its chains from graphs, `a2a`, with a page 0 of NaN, which "
        "padding reads; Gemma-3 `symm`; SGLang's custom all-reduce, `symm` on 2 and 4 H100s, "
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
        "`a2a` and with `symm` of 4 from graphs; Ring-2.5 `a2a` and `symm`, Kimi-Linear `symm`",
    ),
    Seen(
        *("triton", "MLA", "several GPUs", ("graph", "extend", "verify")),
        "two H200s, DeepSeek-V2-shaped `a2a`, `symm`; n-grams from graphs, `a2a`, with a page 0 of "
        "NaN, which padding reads",
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


class Part(NamedTuple):
    """What is no one adapter's, and how it was seen at each place; empty: it was not."""

    what: str
    cpu: str
    one: str = ""
    several: str = ""

    def at(self, place: Place) -> str:
        """How it was seen there."""
        return dict(zip(PLACES, self[1:], strict=True))[place]


PARTS: tuple[Part, ...] = (
    Part(
        "`a2a`, `ag_rs` through SGLang's groups",
        "gloo, 2 to 8 ranks",
        "shared by 2, 3 and 4 ranks",
        "2 and 4 H100s over NVLink, captured; 4 H200s, figures",
    ),
    Part(
        "all_to_all_single over NCCL",
        "a recording stand-in for the library",
        "shared by 2 to 8 ranks, NCCL 2.30.7: eager, captured, on a stream of its own, compiled",
        "in the servers of `a2a`; its tests, by 2 H200s and by more ranks that share them",
    ),
    Part(
        "`symm`, the kernel: protocol, memory, watchdog",
        "interpreter, model checker of the protocol, sm_90 and sm_100 machine code",
        "H100 and H200: virtual ranks, a million calls out of step, processes sharing a GPU; "
        "memcheck and racecheck clean; rows without keys that a mask names",
        "2 and 4 H100s over NVLink: a million calls each, out of step; the watchdog; 2 H200s, out "
        "of step with a row ahead, and with PDL, which was not kept",
    ),
    Part(
        "`symm`, from the flag and from attention to the kernel",
        "flags, refusals, what is prepared and when, routing; Triton's decode and MLA's merge in "
        "the interpreter, 2 and 4 ranks",
        "shared by 2 and 4 ranks: results, graphs, splits of GQA and MLA in one launch, a stuck "
        "peer",
        "2 and 4 H100s, 2 and 4 H200s: results, graphs, whole servers' times",
    ),
    Part(
        "combine, pack and `ag_rs`'s rescale (Triton)",
        "interpreter and plain torch against float64",
        "tests and figures",
        "in the servers of `a2a` and `ag_rs`",
    ),
    Part(
        "extend: requests without a prefix left out, one merge in the model's dtype",
        "conformance suite, schedulers, launches counted; the merge against float64",
        "tests of the kernels, and the servers above",
    ),
    Part(
        "the probe of every exchange at start-up",
        "broken exchanges on one rank of 2 and 3, a scheduler that does not start",
        "every server since 2026-11-29",
        "servers of `a2a` and `symm` on two H200s; broken exchanges on one rank of 2, and of 3 "
        "that share them",
    ),
    Part(
        "Triton's splits by multiprocessors, their merge, what is allocated before the pool",
        "interpreter against float64, sm_90 machine code, unit tests",
        "in the servers above; GQA's and MLA's decode timed",
        "two H200s, in the servers above",
    ),
    Part(
        "what captured graphs read, but masks, prepared by them: FA3, FA4, FlashMLA, TRT-LLM",
        "conformance suite; what is launched outside of a graph, counted: nothing",
        "FA3: `symm` of 4, gpt-oss and Gemma-2 `symm`, Qwen3-Next `a2a`, attention replicas of "
        "Qwen3-MoE; FlashMLA: `symm` of 4",
        "two H200s. FA3: GQA and MLA `symm`, `--attn-tp-size 1`, Gemma-3 `symm`, an fp8 cache with "
        "scales, EAGLE's chains, page 0 of NaN; FA4: GQA `symm`; FlashMLA: `symm`, an fp8 cache "
        "with scales, n-grams, page 0 of NaN; times per token",
    ),
    Part(
        "MLA's long prefixes: at once",
        "SGLang's schedulers on stand-ins, whole servers",
        "DeepSeek-V2-shaped servers by FA3, FlashMLA, FlashInfer and Triton",
        "with FA3 and FlashMLA on two H200s, FlashInfer on two and four",
    ),
    Part(
        "MLA's long prefixes: in chunks",
        "SGLang's schedulers on stand-ins, against `transformers`",
        "by FA3, FlashInfer and FlashMLA, `a2a`; by FlashInfer every token that the test compares, "
        "12 clear ones where it asks for more",
    ),
    Part(
        "MLA's queries gathered latent first, and attended where they lie",
        "their order against a plain gather, SGLang's schedulers, launches counted",
        several="DeepSeek-V2-shaped `a2a` by FA3, FlashMLA, FlashInfer and Triton on two H200s",
    ),
    Part(
        "queries gathered by `symm`'s kernel",
        "interpreter, every bit, 2, 3, 4 and 8 ranks, also out of step; decode of GQA and MLA with "
        "it; sm_90 and sm_100 machine code; launches counted; a broken one stops every rank",
        "virtual ranks, every bit and queries that are not aligned: memcheck and racecheck clean; "
        "a million calls out of step",
        "two H200s: a million calls out of step; Llama-shaped by FA3 and FlashInfer, "
        "DeepSeek-V2-shaped by FA3, FlashMLA and Triton; figures, every bit checked; whole "
        "servers' times",
    ),
    Part(
        "MLA's values projected before the exchange (`--dcp-replicate-v-proj`)",
        "SGLang's schedulers against `transformers` on both sides of the switch; `symm` in the "
        "interpreter",
        "both orders timed, every output checked",
        "two H200s, on both sides of the switch: `symm` by FA3, `a2a` by FlashInfer; figures, "
        "every output checked",
    ),
    Part(
        "hierarchical cache: K and V by owner",
        "whole servers against `transformers`, `direct` transfers; files, a lost page of one rank",
        "a server, `kernel` transfers, without files: Llama-shaped `symm`, DeepSeek-V2-shaped "
        "`a2a`",
    ),
    Part(
        "fp8 cache with a checkpoint's scales",
        "conformance suite, servers",
        "FA3 with `symm`",
        "FA3 and FlashInfer (GQA) and FlashMLA with `symm` on two H200s",
    ),
    Part(
        "hybrid models: Qwen3-Next, Nemotron-H",
        "SGLang's schedulers against `transformers`, one server; recurrences in plain torch",
        "`a2a` by Triton, Qwen3-Next by FA3 and with `symm` too",
    ),
    Part(
        "hybrid models: Kimi-Linear, Ring-2.5",
        "as above",
        "by Triton, Ring-2.5 `a2a` and `symm`, Kimi-Linear `a2a` and `symm`",
        "two H200s: Kimi-Linear by FlashInfer, `a2a`; a YaRN in its configuration, with which it "
        "was not right, is refused",
    ),
    Part(
        "hybrid models: Qwen3.5, Granite-4-H, Falcon-H1, LFM2",
        "as above",
    ),
    Part(
        "hybrid models: GigaChat-3.5, which `transformers` lacks",
        "SGLang's schedulers against SGLang's on one rank",
    ),
    Part(
        "sliding windows in the pool of all layers: Gemma-2, Gemma-3, Command-A",
        "SGLang's schedulers against `transformers`",
        "by FA3 and Triton, `a2a` and `symm`; Gemma-2 by FA3, `symm`",
        "two H200s: Gemma-3 by FA3 and Triton, `symm`",
    ),
    Part(
        "sliding windows in the pool of all layers: Afmoe, Command-A+, Exaone-4, K-EXAONE",
        "as above",
    ),
    Part(
        "sliding windows in a pool of their own, attention sinks: gpt-oss",
        "as above; sinks against float64 in every exchange, `symm`'s by the interpreter",
        "`a2a` and `symm` by FA3, `symm` by Triton",
    ),
    Part(
        "sliding windows in a pool of their own: Gemma-4, Granite-SWA, Laguna, Mellum, MiMo-V2, "
        "Step-3.5",
        "as above; a server of Granite-SWA",
    ),
    Part(
        "drafts: n-grams of GQA and MLA, EAGLE, MTP",
        "SGLang's schedulers against `transformers`, right drafts counted beside a server without "
        "sharding; captured verify passes by the conformance suite",
        "n-grams from graphs by Triton and FlashInfer (GQA) and FA3 (GQA, MLA); EAGLE and MTP "
        "from graphs by Triton, MTP by FA3, FlashMLA and FlashInfer",
        "two H200s: n-grams of MLA from graphs by FA3, FlashMLA, FlashInfer and Triton; EAGLE's "
        "chains from graphs by FA3, FlashInfer and Triton, its trees by Triton; 8 layers of "
        "DeepSeek-V3 with MTP by FA3, times",
    ),
    Part(
        "drafts: EAGLE3, standalone models",
        "as above",
    ),
    Part(
        "prefill-decode disaggregation by Mooncake",
        "both sides as schedulers against `transformers`, over a stand-in for Mooncake's engine: "
        "plain servers, to decode servers of 2 ranks and of 4 on 2 head shards, between equal "
        "layouts of 2, Llama- and DeepSeek-V2-shaped, by `symm` in the interpreter; prefixes on "
        "both sides, retraction, abort, a killed prefill and a killed decode server; rows of K and "
        "V in 200 layouts; behind SGLang's router",
        several="two H200s, over the stand-in, to a decode server of `symm`: DeepSeek-V2- and "
        "Llama-shaped",
    ),
    Part(
        "experts of other ranks (`--ep-size`), memory released and resumed, generation paused, "
        "sessions",
        "servers, GQA and MLA",
    ),
    Part(
        "pipeline stages, replicas (`--dp-size`), mixed chunks, retraction, structured output, "
        "weight updates",
        "servers or SGLang's schedulers",
    ),
    Part(
        "attention data parallelism (`--attn-dp-size`)",
        "SGLang's schedulers against `transformers`: two replicas of two and of four ranks, also "
        "one of them idle; a server of MLA",
        "two replicas of two ranks, `a2a`: DeepSeek-V2-shaped by FA3, Qwen3-MoE-shaped by FA3 and "
        "Triton",
    ),
    Part(
        "Mooncake's store behind the hierarchical cache of MLA",
        "SGLang's schedulers against `transformers`, over a stand-in for its client",
    ),
    Part(
        "metrics of every rank: rows, exchanged batches, seconds waited",
        "unit tests, a server of two ranks",
    ),
    Part(
        "several nodes",
        "two launchers of one host as two nodes, [nodes.md](nodes.md)",
    ),
    Part(
        "commits on SGLang's tree (`export`)",
        "SGLang's schedulers from that tree, the plugin uninstalled, against `transformers`: "
        "every patch but `symm`, each without the later ones; drafts, disaggregation, metrics and "
        "two nodes",
    ),
    Part(
        "all-to-alls of FlashInfer and of torch beside ours in `benchmark.dcp collectives`",
        "their arguments and layouts, against what both document",
        several="two H200s, every output checked, and timed",
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


def seen_on_gpus(
    backend: str,
    attention: Attention,
    features: Set[Feature] = frozenset({"graph", "extend"}),
    *,
    major: int | None = None,
) -> bool:
    """Whether GPUs of one place did all of these; by default prompts, and decode from graphs.

    major: of the compute capability of the GPUs that count; None: any.
    """
    return any(
        seen(backend, attention, place) >= features
        for place, found in MAJORS.items()
        if major in (None, found)
    )
