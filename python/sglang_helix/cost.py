"""What a token costs in each layout: milliseconds by a model fitted to the figures of docs/figures.

A step of decode reads the weights of a rank and its part of the cache; around that stand a fixed
time for each layer, and, over a sharded cache, the exchange and the gathering of queries:

    GPU  = layers * (layer + mla + exchange + gather + projection) + moe layers * moe
         + weights / weight bandwidth + layers * attention + sent bytes / link bandwidth
         + recurrent layers * recurrent + states, read and written, / cache bandwidth
    step = the longer of GPU and host

`host` is what SGLang's scheduler takes for a step, which runs beside the GPU's step before: short
contexts of a small model wait for it. Over a sharded cache it took longer until captured graphs
prepared themselves, after the servers that the parameters are of.

`attention` is a kernel's least time plus the longer of reading its rows and of its arithmetic
(for MLA with many heads the latter). `projection` is what it takes more to project values before
the exchange (`--dcp-replicate-v-proj`), which then sends less. Bytes are counted from the model's
configuration. The rest are the parameters of `cost.json`, which `python -m benchmark.dcp fit`
writes and refuses to write where a measured row is missed by more than 15%. What no figure of
docs/figures has seen (other GPUs than H100 and H200, more than 4 ranks, fp8, servers that project
values first) is computed from the vendor's bandwidths.

Units: bytes, microseconds, tokens; results in milliseconds.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sglang_helix.layout import Row, Shape, rows, tokens_in, values_bytes, wire_bytes
from sglang_helix.srt.distributed.topology import Layout
from sglang_helix.srt.models.value_switch import switch

PARAMETERS = Path(__file__).with_name("cost.json")


class Gpu(NamedTuple):
    """A GPU by its vendor's figures: TB/s of memory, GB/s to its peers, dense bf16 TFLOP/s, GiB."""

    memory_tb_s: float
    link_gb_s: float
    tflops: float
    memory_gib: float


GPUS = {
    "h100": Gpu(3.35, 450, 989, 80),
    "h200": Gpu(4.8, 450, 989, 141),
    "b200": Gpu(8.0, 900, 2250, 180),
    "gb200": Gpu(8.0, 900, 2500, 186),
}


def gpu_of(text: str) -> Gpu:
    """A GPU by its name, or by its four figures with commas between.

    Raises:
        ValueError: it is neither.
    """
    if text.lower() in GPUS:
        return GPUS[text.lower()]
    try:
        figures = [float(part) for part in text.split(",")]
        if len(figures) == len(Gpu._fields) and min(figures) > 0:
            return Gpu(*figures)
    except ValueError:
        pass
    raise ValueError(
        f"--gpu {text}: give one of {', '.join(GPUS)}, or TB/s of memory, GB/s to peers, dense "
        "bf16 TFLOP/s and GiB as 4.8,450,989,141"
    )


def gpu_called(device: str) -> Gpu | None:
    """A GPU by what CUDA calls it ("NVIDIA H200"); None for others than those above."""
    return next((GPUS[word] for word in device.lower().split() if word in GPUS), None)


class Parameters(NamedTuple):
    """Microseconds a layer, and shares of the vendor's bandwidths and arithmetic."""

    host: dict[str, float]  # of a whole step, PLAIN and SHARDED
    layer: float  # norms, projections' launches, all-reduces
    mla: float  # what MLA adds to it
    moe: float  # what a layer of experts adds
    recurrent: float  # what a layer with a recurrent state has in attention's place
    attention: dict[str, float]  # by backend: the least time of a call
    exchange: dict[str, float]  # by --dcp-comm-backend
    gather: dict[str, float]  # of queries, where they are not replicated: by what gathers them
    weights: float
    cache: float
    arithmetic: float
    link: dict[str, float]  # by --dcp-comm-backend, and by what gathers queries

    @property
    def exchanges(self) -> list[str]:
        """Those that were fitted, that of the least time a call first."""
        return sorted(self.exchange, key=self.exchange.__getitem__)


BY_KERNEL, BY_NCCL = "kernel", "all-gather"
PLAIN, SHARDED = "plain TP", "sharded"


def gathers(exchange: str) -> str:
    """What gathers queries in a server of this process's environment: its kernel, or NCCL."""
    # Here, since it imports torch, and start-up's launcher imports this module.
    from sglang_helix.srt.layers.dcp.exchange import BACKENDS, gathers_by_kernel

    has_kernel = BACKENDS[exchange].query_kernel is not None
    return BY_KERNEL if has_kernel and gathers_by_kernel() else BY_NCCL


class Model(NamedTuple):
    """What of a model decides a step's time: parameters in elements, of all ranks together."""

    shape: Shape
    depth: int  # layers, with those that keep no cache
    queries: int  # parameters of the query projections (MLA: of all heads, from the latent)
    attention: int  # what else attention reads once, split over ranks
    copied: int  # what every rank reads whole: MLA's projections to latents, routers
    dense: int  # parameters of feed-forward layers that every token reads, and of the head
    experts: int  # parameters of one expert
    expert_layers: int
    routed: int  # experts of a layer
    chosen: int  # of these, by a token
    recurrent_layers: int = 0
    state: int = 0  # bytes of a request's recurrent states, on all ranks together
    value: int = 0  # of MLA: the width of what a head's latent is projected to


def model_of(model_config: Any) -> Model:
    """A model from SGLang's ModelConfig."""
    from sglang_helix.layout import recurrent_states, shape_of

    shape, text = shape_of(model_config), model_config.hf_text_config
    hidden, depth, heads = text.hidden_size, model_config.num_hidden_layers, shape.query_heads

    def one_of(*names: str, default: int = 0) -> int:
        return next((int(v) for name in names if (v := getattr(text, name, None))), default)

    if shape.kv_heads is None:
        low_rank, latent = one_of("q_lora_rank"), shape.output_width
        nope, rope, value = text.qk_nope_head_dim, text.qk_rope_head_dim, text.v_head_dim
        queries = (low_rank or hidden) * heads * (nope + rope) + heads * nope * latent
        attention = heads * value * (latent + hidden)
        copied = hidden * (low_rank + shape.row_width)
    else:
        queries = hidden * heads * shape.query_width
        attention = heads * shape.output_width * hidden
        copied = 0
    states, recurrent = recurrent_states(model_config, 1), 0
    attending = depth
    if states is not None:
        attending = shape.layers
        recurrent = len(states.layers) * _recurrent_weights(states.shape, hidden)
    routed = one_of("n_routed_experts", "num_local_experts", "num_experts")
    expert_layers = depth - one_of("first_k_dense_replace") if routed else 0
    feed_forward = one_of("intermediate_size", "ffn_hidden_size")
    width = one_of("moe_intermediate_size", "expert_ffn_hidden_size", default=feed_forward)
    shared = one_of("shared_expert_intermediate_size")
    shared = shared or width * one_of("n_shared_experts", "num_shared_experts")
    dense = 3 * hidden * (feed_forward * (depth - expert_layers) + shared * expert_layers)
    return Model(
        shape,
        depth,
        queries=queries * attending,
        attention=attention * attending,
        copied=copied * attending + hidden * routed * expert_layers,
        dense=dense + recurrent + hidden * text.vocab_size,
        experts=3 * hidden * width,
        expert_layers=expert_layers,
        routed=routed,
        chosen=one_of("num_experts_per_tok", "num_experts_per_token", "moe_topk"),
        recurrent_layers=len(states.layers) if states is not None else 0,
        state=int(states.mamba_cache_per_req) if states is not None else 0,
        value=0 if shape.kv_heads is not None else value,
    )


def _recurrent_weights(state: Any, hidden: int) -> int:
    """Parameters of a recurrent layer, by SGLang's shape of its state on one rank.

    Projections to what its convolution takes (without one, to queries, keys and values), to a gate
    as wide as its values, and back from these.
    """
    value = state.num_heads * state.head_dim
    taken = sum(max(part) for part in state.conv) or 3 * value
    return int(hidden * (taken + 2 * value))


@functools.cache
def fitted() -> Parameters:
    """The parameters that the package ships."""
    return Parameters(**json.loads(PARAMETERS.read_text()))


class Choice(NamedTuple):
    """How a server is started: its layout, exchange, where queries come from, and values."""

    row: Row
    exchange: str  # "" for plain TP
    replicated: bool
    values_first: bool = False  # of MLA: projected before the exchange
    gather: str = ""  # what gathers queries, if not what does by default

    @property
    def flags(self) -> str:
        """On the command line, beside --tp-size."""
        layout = self.row.layout
        if layout.kvp_size == 1:
            return "plain TP"
        size = f"--dcp-size {layout.kvp_size}"
        if self.replicated:
            size = f"--attn-tp-size {layout.attn_tp_size}"
        values = " --dcp-replicate-v-proj" if self.values_first else ""
        return f"{size} --dcp-comm-backend {self.exchange}{values}"


def weight_bytes(
    model: Model, layout: Layout, replicated: bool, requests: int | None, element: float
) -> float:
    """What a rank reads of its weights for one token of each request; all it holds: None.

    Of a layer's E experts a batch of B tokens, k experts each, reads E * (1 - (1 - k/E)^B), if all
    are as likely.
    """
    ranks, experts = layout.tp_size, 0.0
    if model.routed:
        share = model.chosen / model.routed
        read = 1.0 if requests is None else 1 - (1 - share) ** requests
        experts = model.expert_layers * model.experts * model.routed * read
    key_values = 0.0
    if model.shape.kv_heads is not None:
        hidden = model.attention / (model.shape.query_heads * model.shape.output_width)
        key_values = hidden * model.shape.row_width * layout.kv_heads(model.shape.kv_heads)
    split = model.attention + model.dense + experts
    queries = model.queries / (layout.attn_tp_size if replicated else ranks)
    return element * (split / ranks + queries + key_values + model.copied)


def step_ms(
    model: Model,
    choice: Choice,
    gpu: Gpu,
    parameters: Parameters,
    *,
    context: int,
    requests: int,
    backend: str = "fa3",
    weight_element: float = 2,
    of_gpu: bool = False,
) -> float:
    """Milliseconds from one token to the next of `requests` with `context` tokens each.

    of_gpu: what the GPU takes alone, whether or not it waits for the host.
    """
    row, shape = choice.row, model.shape
    layout, layers = row.layout, shape.layers
    memory, link = gpu.memory_tb_s * 1e6, gpu.link_gb_s * 1e3  # bytes a microsecond
    tokens = requests * context / layout.kvp_size
    read = tokens * row.kv_bytes / layers / (memory * parameters.cache)
    flops = 2 * tokens * row.query_heads * (shape.query_width + shape.output_width)
    computed = flops / (gpu.tflops * 1e6 * parameters.arithmetic)
    layer = parameters.attention[backend] + max(read, computed)
    if layout.kvp_size > 1:
        wire = "ag_rs" if choice.exchange == "ag_rs" else "a2a"
        sent = row.wire_bytes[f"{wire}+q"]
        gathered = row.wire_bytes[wire] - sent
        if choice.values_first and switch().pays(requests):
            sent = wire_bytes(shape._replace(output_width=model.value), layout)[f"{wire}+q"]
            heads = row.query_heads - row.own_heads
            layer += _projection_us(model, heads, requests, gpu, parameters)
        layer += parameters.exchange[choice.exchange]
        layer += requests * sent / (link * parameters.link[choice.exchange])
        if not choice.replicated:
            by = choice.gather or gathers(choice.exchange)
            layer += parameters.gather[by] + requests * gathered / (link * parameters.link[by])
    if shape.kv_heads is None:
        layer += parameters.mla
    weights = weight_bytes(model, layout, choice.replicated, requests, weight_element)
    states = 2 * requests * model.state / layout.tp_size
    gpu_us = (
        layers * layer
        + model.depth * parameters.layer
        + model.expert_layers * parameters.moe
        + model.recurrent_layers * parameters.recurrent
        + weights / (memory * parameters.weights)
        + states / (memory * parameters.cache)
    )
    host_us = parameters.host[SHARDED if layout.kvp_size > 1 else PLAIN]
    return (gpu_us if of_gpu else max(gpu_us, host_us)) / 1e3


# Of what makes values of latents: the series replicates no other than full precision.
VALUE_ELEMENT = 2


def _projection_us(
    model: Model, heads: int, requests: int, gpu: Gpu, parameters: Parameters
) -> float:
    """Microseconds a layer to project latents of so many heads: their weights, or arithmetic."""
    elements = heads * model.shape.output_width * model.value
    read = VALUE_ELEMENT * elements / (gpu.memory_tb_s * 1e6 * parameters.weights)
    computed = 2 * requests * elements / (gpu.tflops * 1e6 * parameters.arithmetic)
    return max(read, computed)


# Of a GPU's memory, what SGLang gives to weights and cache by default on such GPUs, about.
_STATIC = 0.88
# The longest context that a crossing point is looked for in.
_LONGEST = 1 << 24


class Advice(NamedTuple):
    """What is compared: a model on N ranks of one kind of GPU, by each way to serve it."""

    model: Model
    gpu: Gpu
    choices: Sequence[Choice]  # plain TP first
    weight_element: float

    @property
    def exchange(self) -> str:
        """The first of those compared; "" where no layout shards the cache."""
        return next((choice.exchange for choice in self.choices[1:]), "")

    def ms(self, choice: Choice, context: int, requests: int, *, of_gpu: bool = False) -> float:
        """By the shipped parameters."""
        return step_ms(
            self.model,
            choice,
            self.gpu,
            fitted(),
            context=context,
            requests=requests,
            weight_element=self.weight_element,
            of_gpu=of_gpu,
        )

    def fits(self, choice: Choice, context: int) -> int:
        """How many requests of that many tokens the cache holds."""
        return choice.row.kv_tokens // context

    def best(self, context: int, requests: int) -> Choice | None:
        """The fastest of those that hold the requests."""
        able = [choice for choice in self.choices if self.fits(choice, context) >= requests]
        return min(able, key=lambda choice: self.ms(choice, context, requests), default=None)

    def crossing(self, requests: int) -> int | None:
        """The shortest context from which a sharded cache is faster than plain TP, if any."""
        plain, *sharded = self.choices

        def wins(context: int) -> bool:
            fastest = min(self.ms(choice, context, requests) for choice in sharded)
            return fastest < self.ms(plain, context, requests)

        return first(wins, _LONGEST) if sharded else None


def first(holds: Callable[[int], bool], last: int) -> int | None:
    """The least n in 1..last from which `holds`, which does not stop holding; None: none."""
    if not holds(last):
        return None
    low, high = 0, last
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


# Bytes of a weight, by SGLang's names of quantizations and by `--weight-dtype`.
_QUANTIZED = {"fp8": 1, "modelopt_fp8": 1, "fp4": 0.5, "mxfp4": 0.5, "modelopt_fp4": 0.5}


def weight_element_of(model_config: Any, weight_dtype: str | None = None) -> float:
    """Bytes of a weight: as asked for, or as the checkpoint's config.json says."""
    return _QUANTIZED.get(weight_dtype or model_config.quantization, model_config.dtype.itemsize)


def advise(
    model: Model,
    tp_size: int,
    gpu: Gpu,
    *,
    kv_memory_gib: float | None,
    cache_bytes: int,
    weight_element: float = 2,
    exchanges: Sequence[str] | None = None,
    values_first: bool = False,
    draft: Shape | None = None,
) -> Advice:
    """Every legal layout by each exchange; `kv_memory_gib`: of each rank, None: what weights leave.

    exchanges: None for all that were fitted.
    values_first: of MLA, with values projected before the exchange.
    draft: a draft model's, whose whole cache takes its part of the memory; its weights are not
        counted, nor its time.

    Raises:
        ValueError: the weights leave no memory, N ranks cannot serve the model, or it has no values
            to project.
    """
    if values_first and not model.value:
        raise ValueError("--dcp-replicate-v-proj: only MLA projects values behind attention")

    compared = fitted().exchanges if exchanges is None else exchanges

    def choices() -> Iterator[Choice]:
        listed = (rows(model.shape, tp_size, 0, cache_bytes, beside) for beside in (None, draft))
        for row, with_draft in zip(*listed, strict=True):
            sharded = row.layout.kvp_size > 1
            for replicated in (False, True) if sharded else (False,):
                memory = kv_memory_gib
                if memory is None:
                    held = weight_bytes(model, row.layout, replicated, None, weight_element)
                    if values_first and sharded:
                        held += values_bytes(model.shape, model.value, row.layout, VALUE_ELEMENT)
                    memory = gpu.memory_gib * _STATIC - held / 2**30
                if memory <= 0:
                    raise ValueError(
                        f"--tp {tp_size}: the weights take all of {gpu.memory_gib:g} GiB a rank; "
                        "give more ranks, --weight-dtype fp8, or --kv-memory-gib"
                    )
                tokens = tokens_in(memory * 2**30, row.layout, with_draft.kv_bytes)
                for exchange in compared if sharded else ("",):
                    yield Choice(
                        row._replace(kv_tokens=tokens),
                        exchange,
                        replicated,
                        values_first and sharded,
                    )

    listed = tuple(choices())
    if not listed:
        raise ValueError(f"--tp {tp_size} cannot serve {model.shape.query_heads} query heads")
    return Advice(model, gpu, listed, weight_element)
