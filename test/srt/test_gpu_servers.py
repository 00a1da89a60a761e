"""Whole servers on CUDA: graphs, the overlap schedule, Triton's kernels and NCCL, one rank or more.

Each rank has a GPU of its own where there are enough.

The oracle computes in fp32 and the servers in bf16, so a token counts only where the oracle's
choice is clear. A cache row lost or read twice moves log-probabilities by far more.
"""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sglang.srt.runtime_context import get_platform
from sglang_cpu_reference.checkpoints import FAMILIES, Family, make_checkpoint
from sglang_cpu_reference.oracle import Completion, Oracle
from sglang_cpu_reference.server import Server
from sglang_helix.srt.layers.attention.adapters import ADAPTERS, Attention, adapter, serving
from sglang_helix.srt.models.value_switch import switch
from srt import share_gpu
from srt.expected import prompt
from srt.mem_cache.test_hierarchical_cache import ask_and_continue, cached
from srt.models.test_windows import CUT
from srt.speculative.test_ngram import needs_compiler
from srt.test_end_to_end import everything_is_free

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.server,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NEW_TOKENS = 8
CHUNK = 256  # holds a page of FlashMLA on 4 ranks
# bf16 against fp32, in log-probability: transformers' own bf16 differs by up to 0.2 here.
TOLERANCE = 0.4
LAYOUTS = {
    "tp 1": (1,),
    "ag_rs": (2, "--dcp-size", "2", "--dcp-comm-backend", "ag_rs"),
    "a2a": (2, "--dcp-size", "2", "--dcp-comm-backend", "a2a"),
    "symm": (2, "--dcp-size", "2", "--dcp-comm-backend", "symm"),
    "attn-tp 1": (2, "--attn-tp-size", "1"),
    "attn-tp 2 of 4": (4, "--attn-tp-size", "2"),
    "symm of 4": (4, "--attn-tp-size", "1", "--dcp-comm-backend", "symm"),
}
REPLICAS = (4, "--attn-dp-size", "2", "--dcp-size", "2", "--dcp-comm-backend", "a2a")
# With 4 ranks a prompt of one token leaves three of them without any.
SHARDED = ("a2a", "symm", "attn-tp 1", "symm of 4")
ATTENTION: dict[str, Attention] = {"llama": "GQA", "deepseek_v2": "MLA"}
HYBRIDS: dict[str, Attention] = {
    "qwen3_next": "GQA",
    "kimi_linear": "MLA",
    "nemotron_h": "GQA",
    "bailing_hybrid": "MLA",
}
CASES = [
    *itertools.product(ATTENTION, LAYOUTS, ("triton",)),
    *(
        (family, layout, record.name)
        for family, attention in ATTENTION.items()
        for record in serving(attention)
        if record.name not in ("triton", "torch_native")
        for layout in SHARDED
    ),
    *itertools.product(HYBRIDS, ("tp 1", "a2a", "symm"), ("triton",)),
    ("qwen3_next", "a2a", "fa3"),
    ("kimi_linear", "a2a", "flashinfer"),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "llama": make_checkpoint("llama", root / "llama", head_dim=64),
        # The widths of the real model, which MLA kernels are written for. Here and below
        # all experts at once: bf16 turns over no choice of them.
        "deepseek_v2": make_checkpoint(
            "deepseek_v2",
            root / "deepseek_v2",
            qk_nope_head_dim=128,
            v_head_dim=128,
            num_experts_per_tok=8,
        ),
        "qwen3_next": make_checkpoint(
            "qwen3_next",
            root / "qwen3_next",
            head_dim=64,
            num_key_value_heads=1,
            linear_key_head_dim=128,
            linear_value_head_dim=128,
            num_experts_per_tok=8,
        ),
        "qwen3_moe": make_checkpoint(
            "qwen3_moe", root / "qwen3_moe", head_dim=64, num_experts_per_tok=8
        ),
        "kimi_linear": make_checkpoint(
            in_bf16("kimi_linear"),
            root / "kimi_linear",
            qk_nope_head_dim=128,
            v_head_dim=128,
            linear_attn_config={
                **FAMILIES["kimi_linear"].config["linear_attn_config"],
                "head_dim": 128,
            },
            num_experts_per_token=8,
        ),
        "nemotron_h": make_checkpoint(
            "nemotron_h", root / "nemotron_h", head_dim=64, num_key_value_heads=1
        ),
        "bailing_hybrid": make_checkpoint(
            in_bf16("bailing_hybrid"),
            root / "bailing_hybrid",
            qk_nope_head_dim=128,
            v_head_dim=128,
            head_dim=128,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=8,
        ),
        # One key-value head for two ranks, a window that prompts end before, at and beyond.
        "gpt_oss": make_checkpoint(
            in_bf16("gpt_oss"),
            root / "gpt_oss",
            head_dim=64,
            num_key_value_heads=1,
            sliding_window=64,
            num_experts_per_tok=4,
        ),
        # Windows in the pool of all layers. Heads of 64, where a model takes it from its width too.
        "gemma3": make_checkpoint(CUT["gemma3"], root / "gemma3", head_dim=64, sliding_window=64),
        "cohere2": make_checkpoint(
            CUT["cohere2"], root / "cohere2", hidden_size=512, head_dim=64, sliding_window=64
        ),
        # Logits that are capped.
        "gemma2": make_checkpoint(CUT["gemma2"], root / "gemma2", head_dim=64, sliding_window=64),
    }


def in_bf16(family: str) -> Family:
    """The family, bf16 in its configuration too: some models take it from there, not the flag."""
    return FAMILIES[family]._replace(written={**FAMILIES[family].written, "dtype": "bfloat16"})


def gpu_server(
    checkpoint: Path, layout: str, *flags: str, attention: str = "triton", launcher: str = ""
) -> Server:
    """Ranks share a GPU where there are fewer GPUs than ranks.

    launcher: a module of these tests that starts the server in place of `sglang.launch_server`.
    """
    ranks, *layout_flags = REPLICAS if layout == "replicas" else LAYOUTS[layout]
    sharing = int(ranks) > torch.cuda.device_count()
    server = Server(
        checkpoint,
        *("--tp", str(ranks), *map(str, layout_flags)),
        *("--attention-backend", attention, "--dtype", "bfloat16"),
        *("--mem-fraction-static", "0.2", "--cuda-graph-max-bs-decode", "16"),
        *(share_gpu.FLAGS if sharing else ()),
        *flags,
        platform=None,
        env=share_gpu.ENVIRONMENT if sharing else None,
        start_timeout=480,
    )
    if launcher := launcher or (share_gpu.__name__ if sharing else ""):
        server.command[1:3] = ["-m", launcher]
        server.env["PYTHONPATH"] = f"{Path(__file__).parents[1]}:{server.env.get('PYTHONPATH', '')}"
    return server


@pytest.mark.timeout(540)
@pytest.mark.parametrize(("family", "layout", "attention"), CASES)
def test_layout(checkpoints: dict[str, Path], family: str, layout: str, attention: str) -> None:
    states = ("--max-mamba-cache-size", "64") if family in HYBRIDS else ()
    kind = (ATTENTION | HYBRIDS)[family]
    serve_and_compare(checkpoints[family], layout, attention, kind, *states)


@pytest.mark.timeout(540)
@pytest.mark.parametrize("family", ["deepseek_v2", "qwen3_moe"])
@pytest.mark.parametrize("attention", ["fa3", "triton"])
def test_attention_replicas(checkpoints: dict[str, Path], family: str, attention: str) -> None:
    """Two of two ranks; a request alone leaves the other without any, in graphs and outside."""
    kind: Attention = "MLA" if family == "deepseek_v2" else "GQA"
    if not adapter(attention).runs_on(get_platform(), kind):
        pytest.skip(f"no kernels of {attention} for this GPU")
    oracle, clear = Oracle(checkpoints[family]), 0
    flags = ("--max-total-tokens", "16384", "--chunked-prefill-size", str(2 * CHUNK))
    with gpu_server(checkpoints[family], "replicas", *flags, attention=attention) as server:
        prompts = [prompt(length) for length in (1, 2, 63, 64, 65, 2 * CHUNK + 3)]
        answers = [server.generate(tokens, NEW_TOKENS) for tokens in prompts]
        for size in (3, 8, 13):
            batch = [prompt(20 + 17 * place, seed=size) for place in range(size)]
            answers += server.generate_batch(batch, NEW_TOKENS)
            prompts += batch
        for tokens, answer in zip(prompts, answers, strict=True):
            clear += compared(answer.completion, oracle.generate(tokens, NEW_TOKENS))
        assert clear > 60
        assert "cuda graph: True" in server.log()


@pytest.mark.timeout(540)
@pytest.mark.parametrize("layout", ["ag_rs", "a2a", "symm"])
@pytest.mark.parametrize(
    "attention", [one.name for one in ADAPTERS if one.windows and not one.off_cuda]
)
def test_windows_and_sinks(checkpoints: dict[str, Path], layout: str, attention: str) -> None:
    serve_and_compare(
        checkpoints["gpt_oss"], layout, attention, "GQA", "--moe-runner-backend", "triton"
    )


@pytest.mark.timeout(540)
@pytest.mark.parametrize("family", ["gemma3", "cohere2", "gemma2"])
@pytest.mark.parametrize("layout", ["a2a", "symm"])
@pytest.mark.parametrize("attention", ["fa3", "triton"])
def test_windows_cut_by_owner(
    checkpoints: dict[str, Path], attention: str, layout: str, family: str
) -> None:
    serve_and_compare(checkpoints[family], layout, attention, "GQA")


@pytest.mark.timeout(540)
@pytest.mark.parametrize(
    ("layout", "attention"), [("a2a", "flashinfer"), ("symm", "fa3"), ("symm of 4", "triton")]
)
def test_values_projected_before_the_exchange(
    checkpoints: dict[str, Path], layout: str, attention: str
) -> None:
    """Batches below the switch, padded up to it, and beyond."""
    at = switch().from_tokens
    flags = ("--dcp-replicate-v-proj", "--cuda-graph-max-bs-decode", str(2 * at))
    serve_and_compare(
        *(checkpoints["deepseek_v2"], layout, attention, "MLA", *flags), sizes=(3, at - 1, at + 5)
    )


def serve_and_compare(
    checkpoint: Path,
    layout: str,
    attention: str,
    kind: Attention,
    *flags: str,
    sizes: tuple[int, ...] = (3, 8, 13),
) -> None:
    """Prompts of every length that matters, one by one and in batches of several sizes."""
    if not adapter(attention).runs_on(get_platform(), kind):
        pytest.skip(f"no kernels of {attention} for this GPU")
    server = gpu_server(
        checkpoint,
        layout,
        *("--max-total-tokens", "16384", "--chunked-prefill-size", str(CHUNK), *flags),
        attention=attention,
    )
    oracle = Oracle(checkpoint)
    clear = 0
    with server:
        prompts = [prompt(length) for length in (1, 2, 63, 64, 65, 2 * CHUNK + 3)]
        for tokens in prompts:
            answer = server.generate(tokens, NEW_TOKENS)
            clear += compared(answer.completion, oracle.generate(tokens, NEW_TOKENS))
        shared = prompts[-1] + prompt(5, seed=1)
        answer = server.generate(shared, NEW_TOKENS)
        assert answer.cached_tokens > 0
        clear += compared(answer.completion, oracle.generate(shared, NEW_TOKENS))
        # Batches of several sizes: graphs of several sizes, padded ones among them.
        for size in sizes:
            batch = [prompt(20 + 17 * place, seed=size) for place in range(size)]
            answers = server.generate_batch(batch, NEW_TOKENS)
            for tokens, answer in zip(batch, answers, strict=True):
                clear += compared(answer.completion, oracle.generate(tokens, NEW_TOKENS))
        assert clear > 60
        log = server.log()
        assert "cuda graph: True" in log
        everything_is_free(server)


@pytest.mark.timeout(540)
@pytest.mark.parametrize("attention", ["fa3", "flashinfer", "flashmla"])
def test_a_long_prefix_of_mla_in_chunks(checkpoints: dict[str, Path], attention: str) -> None:
    """What SGLang does from 128K tokens on: attends a prefix un-absorbed, chunk after chunk."""
    if not adapter(attention).runs_on(get_platform(), "MLA"):
        pytest.skip(f"no kernels of {attention} for this GPU")
    checkpoint = checkpoints["deepseek_v2"]
    flags = ("--max-total-tokens", "16384", "--chunked-prefill-size", str(CHUNK))
    server = gpu_server(checkpoint, "a2a", *flags, attention=attention)
    server.env["SGLANG_CHUNKED_PREFIX_CACHE_THRESHOLD"] = "1"
    server.env["SGLANG_MAX_KV_CHUNK_CAPACITY"] = str(CHUNK)
    oracle = Oracle(checkpoint)
    clear = 0
    with server:
        # Of two lengths in a batch, so that one prefix ends before the other.
        batch = [prompt(length) for length in (4 * CHUNK + 3, 3 * CHUNK, 2 * CHUNK + 70, 2 * CHUNK)]
        continued = [tokens + prompt(9, seed=1) for tokens in batch]
        for prompts in (batch, continued):
            answers = server.generate_batch(prompts, NEW_TOKENS)
            for tokens, answer in zip(prompts, answers, strict=True):
                clear += compared(answer.completion, oracle.generate(tokens, NEW_TOKENS))
        assert clear > 12


@pytest.mark.timeout(540)
@pytest.mark.parametrize(("family", "layout"), [("llama", "symm"), ("deepseek_v2", "a2a")])
def test_prefixes_come_back_from_the_host(
    checkpoints: dict[str, Path], family: str, layout: str
) -> None:
    """HiCache with the transfers that SGLang takes on CUDA: its kernels, on a stream beside."""
    page, rows, ranks, prompts = 16, 512, 2, 6
    flags = ("--page-size", str(page), "--max-total-tokens", str(rows), "--enable-cache-report")
    flags += ("--chunked-prefill-size", "96", "--max-running-requests", "4")
    flags += ("--enable-hierarchical-cache", "--hicache-ratio", "8")
    length = 2 * rows * ranks // prompts
    prefixes = [prompt(length + number, seed=number) for number in range(prompts)]
    oracle = Oracle(checkpoints[family])
    clear = 0
    with gpu_server(checkpoints[family], layout, *flags) as server:
        first, continued = ask_and_continue(server, prefixes, NEW_TOKENS)
        for tokens, answer in first + continued:
            clear += compared(answer.completion, oracle.generate(tokens, NEW_TOKENS))
        from_host = sum(cached(answer, "host") for _, answer in continued)
        assert from_host > prompts * length // 2
        assert clear > 2 * prompts  # every answer's first token, on average
        everything_is_free(server)


@pytest.mark.timeout(540)
@needs_compiler
@pytest.mark.parametrize(
    ("attention", "graphs"),
    [("triton", "disabled"), ("triton", "full"), ("flashinfer", "full"), ("fa3", "full")],
)
@pytest.mark.parametrize("family", ATTENTION)
def test_drafts_from_earlier_answers(
    checkpoints: dict[str, Path], family: str, attention: str, graphs: str
) -> None:
    if not adapter(attention).runs_on(get_platform(), ATTENTION[family]):
        pytest.skip(f"no kernels of {attention} for this GPU")
    flags = ("--cuda-graph-backend-decode", graphs, "--speculative-algorithm", "NGRAM")
    flags += ("--speculative-num-draft-tokens", "6", "--speculative-ngram-max-bfs-breadth", "4")
    flags += ("--speculative-ngram-capacity", "10000", "--page-size", "1")
    flags += ("--max-total-tokens", "16384", "--chunked-prefill-size", str(CHUNK))
    oracle = Oracle(checkpoints[family])
    prompts = [prompt(length) for length in (1, 2, 19, 40, 63, 64, 65, CHUNK + 3)]
    clear = 0
    with gpu_server(checkpoints[family], "a2a", *flags, attention=attention) as server:
        answers = [server.generate(tokens, NEW_TOKENS) for tokens in prompts]
        again = [server.generate(prompts[0], NEW_TOKENS)]
        again += server.generate_batch(prompts[1:], NEW_TOKENS)
        for tokens, answer in zip(prompts * 2, answers + again, strict=True):
            clear += compared(answer.completion, oracle.generate(tokens, NEW_TOKENS))
        assert sum(answer.meta_info["spec_num_correct_drafts"] for answer in again) > NEW_TOKENS
        assert clear > 20
        everything_is_free(server)


@pytest.mark.timeout(1080)
@pytest.mark.parametrize(
    ("family", "layout", "attention", "scaled"),
    [
        ("llama", "a2a", "triton", False),
        *itertools.product(["llama"], ["symm"], ["triton", "fa3", "flashinfer"], [False, True]),
        *itertools.product(["deepseek_v2"], ["symm"], ["flashmla"], [False, True]),
    ],
)
def test_an_fp8_cache_costs_no_more_than_on_one_rank(
    checkpoints: dict[str, Path],
    tmp_path: Path,
    family: str,
    layout: str,
    attention: str,
    scaled: bool,
) -> None:
    """Quantized keys and values move answers away from the oracle's, as far as on one rank.

    Not by the same steps: plain TP attends a chunk with its quantized keys, the series with whole
    ones.
    """
    checkpoint = checkpoints[family]
    oracle = Oracle(checkpoint)
    if scaled:
        checkpoint = with_cache_scales(checkpoint, tmp_path / "scaled")
    flags = ("--max-total-tokens", "16384", "--chunked-prefill-size", str(CHUNK))
    flags += ("--kv-cache-dtype", "fp8_e4m3")
    prompts = [prompt(length) for length in (1, 63, 65, 2 * CHUNK + 3)]
    errors: dict[str, list[float]] = {}
    for name in ("tp 1", layout):
        with gpu_server(checkpoint, name, *flags, attention=attention) as server:
            assert "dtype: torch.float8_e4m3fn" in server.log()
            errors[name] = [
                abs(said - exact)
                for tokens in prompts
                for answer in [server.generate(tokens, NEW_TOKENS).completion]
                for said, exact in zip(
                    answer.logprobs, scored(oracle, tokens, answer.token_ids), strict=True
                )
            ]
    one, sharded = errors.values()
    assert sum(sharded) < 1.5 * sum(one) + len(one) * TOLERANCE / 8, (sum(sharded), sum(one))
    assert max(sharded) < max(one) + TOLERANCE


@torch.inference_mode()
def scored(oracle: Oracle, tokens: list[int], continuation: list[int]) -> list[float]:
    """The oracle's log-probabilities of a continuation that another has chosen."""
    logits = oracle.model(torch.tensor([tokens + continuation])).logits[0, len(tokens) - 1 : -1]
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    return logprobs.gather(1, torch.tensor(continuation)[:, None])[:, 0].tolist()


def with_cache_scales(checkpoint: Path, directory: Path) -> Path:
    """The checkpoint with scales of its keys and values, as compressed-tensors writes them."""
    shutil.copytree(checkpoint, directory)
    config = json.loads((directory / "config.json").read_text())
    scheme = {"type": "float", "num_bits": 8, "strategy": "tensor", "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "config_groups": {},
        "ignore": [],
        "kv_cache_scheme": scheme,
    }
    (directory / "config.json").write_text(json.dumps(config))
    weights = load_file(directory / "model.safetensors")
    for layer in range(config["num_hidden_layers"]):
        for part, scale in (("k", 0.03 + 0.01 * layer), ("v", 0.02 + 0.01 * layer)):
            weights[f"model.layers.{layer}.self_attn.{part}_scale"] = torch.tensor(scale)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def compared(got: Completion, want: Completion) -> int:
    """Positions in which the oracle's choice is clear, up to the first where it is not."""
    for position, top in enumerate(want.top):
        if top[0][1] - top[1][1] < TOLERANCE:
            return position
        assert got.token_ids[position] == want.token_ids[position], f"token {position}"
        assert abs(got.logprobs[position] - want.logprobs[position]) < TOLERANCE
    return len(want.top)
