"""SGLang's attention backends without a server."""

from __future__ import annotations

import functools
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

K = 2  # ranks of the group; an adapter reads local tokens, whatever their number


class Heads(NamedTuple):
    """H query heads on G key-value heads of width D.

    G = 0: MLA, on one latent of 512 elements and a rope of 64.
    """

    queries: int
    kv: int
    width: int = 128

    @property
    def attention(self) -> str:
        return "GQA" if self.kv else "MLA"

    @property
    def name(self) -> str:
        return f"{self.queries}/{self.kv}" if self.kv else f"MLA {self.queries}"

    @property
    def k_width(self) -> int:
        return self.width if self.kv else 576

    @property
    def v_width(self) -> int:
        return self.width if self.kv else 512

    @property
    def token_elements(self) -> int:
        """Elements of one token's keys and values."""
        return 2 * self.kv * self.width if self.kv else 576

    @property
    def scale(self) -> float:
        """Of the logits. MLA's is that of keys before they are absorbed: 128 and a rope of 64.

        FlashInfer's MLA takes it from the model's configuration, other backends from the layer.
        """
        return (self.width if self.kv else 192) ** -0.5


def dtype_on(device: torch.device) -> torch.dtype:
    """The interpreter truncates what it casts to bf16."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@dataclass(frozen=True)
class Problem:
    heads: Heads
    batch: int
    tokens: int
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        return dtype_on(self.device)

    @property
    def moved(self) -> int:
        """Bytes of all keys and values."""
        return self.batch * self.tokens * self.heads.token_elements * self.dtype.itemsize


class Cache:
    """A pool whose layers hold random keys and values, a query a request, and the right outputs.

    The tokens of a request lie in random pages of 64, as on a server that has run for a while;
    within a page they are in order, which kernels for pages need.
    """

    PAGE = 64

    def __init__(self, p: Problem, layers: int) -> None:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

        self.p, heads = p, p.heads
        pages = -(-p.tokens // self.PAGE)
        common = (p.batch * pages * self.PAGE, self.PAGE, p.dtype)
        place = (layers, p.device.type, False)
        if heads.kv:
            self.pool: Any = MHATokenToKVPool(*common, heads.kv, heads.width, *place)
        else:
            self.pool = MLATokenToKVPool(*common, 512, 64, *place)
        random = torch.Generator(p.device).manual_seed(1)
        for number in range(layers):
            self.pool.get_key_buffer(number).normal_(generator=random)
            if heads.kv:
                self.pool.get_value_buffer(number).normal_(generator=random)
        order = 1 + torch.randperm(p.batch * pages, generator=torch.Generator().manual_seed(2))
        self.pages = order.view(p.batch, pages, 1)
        # Logits of a deviation of 1.5, large enough that the softmax is not flat.
        shape = p.batch, heads.queries, heads.k_width
        self.q = torch.randn(shape, generator=random, device=p.device)
        self.q = (self.q * (1.5 * heads.k_width**-0.5 / heads.scale)).to(p.dtype)
        self.want = [self._attended(number) for number in (0, layers - 1)]

    def slots(self, ranks: int) -> torch.Tensor:
        """[B, tokens * ranks] int32: of this rank's tokens and, between them, of the others'."""
        width = self.PAGE * ranks
        slots = (self.pages * width + torch.arange(width)).flatten(1)
        return slots[:, : self.p.tokens * ranks].to(self.p.device, torch.int32)

    def _attended(self, number: int) -> torch.Tensor:
        """[B, H, Dv] in fp32, one request at a time."""
        heads = self.p.heads
        keys, values = self.pool.get_key_buffer(number), self.pool.get_value_buffer(number)
        outs = []
        for query, rows in zip(self.q.float(), self.slots(1).long(), strict=True):
            k, v = keys[rows].float(), values[rows].float()
            grouped = query.view(k.shape[1], -1, heads.k_width)
            logits = torch.einsum("ghd,tgd->ght", grouped, k) * heads.scale
            outs.append(torch.einsum("ght,tgd->ghd", logits.softmax(-1), v).flatten(0, 1))
        return torch.stack(outs)


@functools.cache
def configured(heads: Heads, ranks: int, backend: str, longest: int, device: torch.device) -> Any:
    """A context of SGLang and its model's configuration, for one rank of `ranks`."""
    from sglang.srt import runtime_context
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.server_args import ServerArgs

    with tempfile.TemporaryDirectory() as folder, ExitStack() as logs:
        # Warnings of servers, each time the same.
        logging.disable(logging.WARNING)
        logs.callback(logging.disable, logging.NOTSET)
        config = model_config(heads, longest * ranks, dtype_on(device))
        Path(folder, "config.json").write_text(json.dumps(config))
        args = ServerArgs(
            model_path=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            device=device.type,
            attention_backend=backend,
            tp_size=ranks,
            dcp_size=ranks,
        )
        context = runtime_context.create_context(args, role="scheduler")
        return context, args, ModelConfig.from_server_args(args)


class Stage:
    """A backend's surroundings: a configuration, a runner with the cache, a batch of one step."""

    def __init__(self, cache: Cache, ranks: int, backend: str, longest: int) -> None:
        self.cache, self.p, self.ranks, self.backend = cache, cache.p, ranks, backend
        self.context, self.args, self.config = configured(
            self.p.heads, ranks, backend, longest, self.p.device
        )
        self.longest = longest * ranks
        self.open = ExitStack()

    def __enter__(self) -> Stage:
        from sglang.srt.layers.radix_attention import RadixAttention
        from sglang.srt.mem_cache.kv_index_translator import KVIndexTranslator
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        p, heads, pool = self.p, self.p.heads, self.cache.pool
        self.open.enter_context(self.published())
        page = pool.page_size
        allocator = SimpleNamespace(page_size=page, get_kvcache=lambda: pool, device=p.device)
        table = torch.zeros((p.batch, self.longest), dtype=torch.int32, device=p.device)
        slots = self.cache.slots(self.ranks)
        table[:, : slots.shape[1]] = slots
        requests = SimpleNamespace(size=p.batch, req_to_token=table)
        self.layers = [
            RadixAttention(
                heads.queries,
                heads.k_width,
                heads.scale,
                num_kv_heads=heads.kv or 1,
                layer_id=number,
                v_head_dim=heads.v_width,
            )
            for number in range(pool.layer_num)
        ]
        self.runner = SimpleNamespace(
            model=torch.nn.ModuleList(self.layers),
            model_config=self.config,
            device=p.device.type,
            gpu_id=0,
            use_mla_backend=not heads.kv,
            page_size=page,
            is_draft_worker=False,
            sliding_window_size=None,
            attention_chunk_size=None,
            init_new_workspace=False,
            req_to_token_pool=requests,
            token_to_kv_pool=pool,
            token_to_kv_pool_allocator=allocator,
            decode_num_tokens_per_req=lambda: 1,
            spec_algorithm=SimpleNamespace(
                is_none=lambda: True, is_dspark=lambda: False, is_frozen_kv_mtp=lambda: False
            ),
            server_args=self.args,
            pre_model_load_memory=0.0,  # the pool is there already
            kv_cache_dtype=p.dtype,
            kv_cache_dtype_str="auto",
            dtype=p.dtype,
            prefill_attention_backend_str=self.backend,
            decode_attention_backend_str=self.backend,
            kv_index_translator=KVIndexTranslator(
                req_to_token=table,
                token_to_kv_pool_allocator=allocator,
                token_to_kv_pool=pool,
                page_size=page,
                device=p.device.type,
            ),
        )
        length = p.tokens * self.ranks
        lens = torch.full((p.batch,), length, dtype=torch.int64)
        self.batch = SimpleNamespace(
            forward_mode=ForwardMode.DECODE,
            batch_size=p.batch,
            seq_lens=lens.to(p.device),
            seq_lens_cpu=lens,
            seq_lens_sum=p.batch * length,
            req_pool_indices=torch.arange(p.batch, device=p.device),
            out_cache_loc=torch.zeros(p.batch, dtype=torch.int64, device=p.device),
            out_cache_loc_is_physical=False,
            positions=lens.to(p.device) - 1,
            input_ids=torch.zeros(p.batch, dtype=torch.int64, device=p.device),
            encoder_lens=None,
            spec_info=None,
            kv_loc_plan=None,
            attn_dcp_metadata=None,
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self.open.close()

    @contextmanager
    def published(self) -> Iterator[None]:
        """The configuration is SGLang's, its rank 0 this process, and the pool's pages its own."""
        from sglang.srt import runtime_context
        from sglang_helix.srt.layers.dcp.exchange import Exchanger

        group = SimpleNamespace(world_size=self.ranks, rank_in_group=0, unique_name="benchmark")
        group.exchanger = Exchanger("a2a", group)
        with (
            runtime_context.use_context(self.context),
            runtime_context.get_parallel().override(
                tp_rank=0,
                attn_tp_rank=0,
                dcp_rank=0,
                attn_dcp_rank=0,
                dcp_group=group,
                dcp_comm_backend="a2a",
            ),
        ):
            self.cache.pool.page_size = runtime_context.get_schedule().page_size or 1
            yield

    def call(self, call: Call, number: int) -> torch.Tensor:
        """What the call returns; where nothing is captured it runs when other stages are open."""
        with self.published():
            return call(number)

    def prepared(self, backend: Any) -> Any:
        """The backend with this batch's metadata: as a captured graph's, or on a CPU eager.

        Of kernels that read pages as a graph's on a CPU too.
        """
        from sglang_helix.srt.layers.attention.sharded_paged import ShardedPagedAttention

        if self.p.device.type == "cuda" or isinstance(backend, ShardedPagedAttention):
            backend.init_cuda_graph_state(self.p.batch, self.p.batch)
            for in_capture in (True, False):
                backend.init_forward_metadata_out_graph(self.batch, in_capture=in_capture)
                backend.init_forward_metadata_in_graph(self.batch)
        else:
            backend.init_forward_metadata(self.batch)
        return backend


def model_config(heads: Heads, length: int, dtype: torch.dtype) -> dict[str, Any]:
    """A config.json of one layer whose attention has these heads."""
    common = {
        "hidden_size": 1024,
        "intermediate_size": 1024,
        "num_hidden_layers": 1,
        "num_attention_heads": heads.queries,
        "vocab_size": 128,
        "max_position_embeddings": length,
        "rms_norm_eps": 1e-5,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if heads.attention == "GQA":
        return common | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_key_value_heads": heads.kv,
            "head_dim": heads.width,
        }
    lite = Path(__file__).parent / "models/DeepSeek-V2-Lite/config.json"
    ours = {
        "num_key_value_heads": heads.queries,
        "rope_scaling": None,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return json.loads(lite.read_text()) | common | ours


# Attends the cache's queries in one of its layers: out [B, H, Dv].
Call = Callable[[int], torch.Tensor]
