"""``./dev demo --real``: a real model answers over whole and sharded caches, side by side."""

import math
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from sglang_cpu_reference.server import Server
from sglang_cpu_reference.smollm2 import FetchError, fetch

#: The model has 3 key-value heads: one a rank, or all of them on each for a third of the tokens.
LAYOUTS = {
    "tp 3": ("--tp", "3"),
    "tp 3, dcp 3, a2a": ("--tp", "3", "--dcp-size", "3", "--dcp-comm-backend", "a2a"),
    "tp 3, attn-tp 1": ("--tp", "3", "--attn-tp-size", "1"),
}
#: Logits of a chunk, 49,152 wide, are kept where log-probabilities of a prompt are asked for.
FLAGS = ("--mem-fraction-static", "0.5", "--chunked-prefill-size", "512")
QUESTIONS = (
    "What is the capital of France?",
    "Explain in one sentence why the sky is blue.",
    "Write two lines of a poem about the sea.",
)
NEW_TOKENS = 48
PROSE_CHARACTERS = 8000


class Run(NamedTuple):
    """One server's answers, its perplexity on the prose, and its pool."""

    answers: list[str]
    perplexity: float
    kv_tokens: int
    kv_bytes: int


def main() -> int:
    """Chat in every layout; returns 1 when a text differs or the model cannot be had, else 0."""
    from sglang_cpu_reference.demo import print_table

    try:
        print("SmolLM2-135M-Instruct: fetched and dequantized once", file=sys.stderr)
        checkpoint = fetch()
    except FetchError as error:
        print(error, file=sys.stderr)
        return 1
    runs = {layout: serve(checkpoint, flags) for layout, flags in LAYOUTS.items()}
    for number, question in enumerate(QUESTIONS):
        print(f"\n> {question}")
        for layout, run in runs.items():
            print(f"  [{layout}] {run.answers[number].strip()}")
    plain = runs["tp 3"]
    rows = [("layout", "text", "perplexity", "KV tokens in the pool", "per MiB of a rank")]
    for layout, run in runs.items():
        same = "equal" if run.answers == plain.answers else "DIFFERENT"
        rows.append(
            (
                layout,
                "" if run is plain else same,
                f"{run.perplexity:.4f}",
                str(run.kv_tokens),
                f"{run.kv_tokens / (run.kv_bytes / 2**20):.0f}",
            )
        )
    print()
    print_table(rows)
    print("\n3 key-value heads on 3 ranks: plain TP stores none twice, so no byte holds more.")
    return int(any(run.answers != plain.answers for run in runs.values()))


def serve(checkpoint: Path, flags: Sequence[str]) -> Run:
    """Start a server with the flags, let it chat and read."""
    print(f"\npython -m sglang.launch_server {' '.join(flags)}", file=sys.stderr)
    with Server(checkpoint, *flags, *FLAGS) as server:
        answers = [chat(server, question, NEW_TOKENS) for question in QUESTIONS]
        logprobs = read(server, prose()[:PROSE_CHARACTERS])
        pool = server.server_info()["sglang_helix"]
    perplexity = math.exp(-sum(logprobs) / len(logprobs))
    return Run(answers, perplexity, pool["kv_tokens"], pool["kv_bytes"])


def prose() -> str:
    """A report to Congress, 31,000 characters, that SGLang is shipped with."""
    text = files("sglang").joinpath("test", "long_prompt.txt").read_text(encoding="utf-8")
    return text.replace("\\n", "\n")


def chat(server: Server, question: str, new_tokens: int, *, stream: bool = False) -> Any:
    """A greedy answer to one user's message; streamed, the events as the server sends them."""
    body = {
        "model": "SmolLM2",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": new_tokens,
        "temperature": 0,
        "stream": stream,
    }
    answer = server.post("/v1/chat/completions", body)
    return answer if stream else answer["choices"][0]["message"]["content"]


def read(server: Server, prompt: str | Sequence[int]) -> list[float]:
    """Natural-log probability of every token of a text, or of token ids, but the first."""
    key = "text" if isinstance(prompt, str) else "input_ids"
    body = {
        key: prompt if isinstance(prompt, str) else list(prompt),
        "sampling_params": {"temperature": 0, "max_new_tokens": 1},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    entries = server.post("/generate", body)["meta_info"]["input_token_logprobs"]
    return [logprob for logprob, *_ in entries[1:]]
