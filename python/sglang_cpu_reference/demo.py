"""``python -m sglang_cpu_reference.demo``: the same prompts over sharded caches and whole ones.

Makes a tiny DeepSeek-V2-shaped checkpoint (MLA, mixture of experts) and a tiny Llama-shaped one
(GQA) with random weights, starts the real server for each with plain tensor parallelism, and with
decode context parallelism, the first once more on two nodes; compares tokens, log-probabilities,
capacity and time; and draws who holds which tokens. With --real it fetches a small real model
instead, see `demo_real`.
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
from sglang_cpu_reference.checkpoints import FAMILIES, make_checkpoint
from sglang_cpu_reference.demo_picture import Panel, draw
from sglang_cpu_reference.progress import Progress
from sglang_cpu_reference.server import Generation, Server

MODELS = {"deepseek_v2": "MLA, MoE", "llama": "GQA"}
PROMPT_LENGTHS = (1, 5, 40, 64, 200)
NEW_TOKENS = 8
HEAD = (
    *("model", "layout", "KV tokens in the pool", "per MiB of a rank"),
    *("tokens", "max |dlogprob|", "time per token"),
)


class Act(NamedTuple):
    """One server. dcp: ranks that share a cache; 1: plain tensor parallelism."""

    family: str
    tp: int
    dcp: int
    backend: str
    nodes: int

    @property
    def flags(self) -> tuple[str, ...]:
        """The flags that a user would type."""
        tp = ("--tp", str(self.tp))
        shared = ("--dcp-size", str(self.dcp), "--dcp-comm-backend", self.backend)
        return tp if self.dcp == 1 else (*tp, *shared)

    @property
    def layout(self) -> str:
        """The layout's name in the table and in the picture."""
        shared = "" if self.dcp == 1 else f", dcp {self.dcp}, {self.backend}"
        return f"tp {self.tp}{shared}{f', {self.nodes} nodes' if self.nodes > 1 else ''}"

    @property
    def seconds(self) -> float:
        """About how long it takes on two cores."""
        return 5 + 3.5 * self.tp + 3 * (self.nodes - 1)


class Run(NamedTuple):
    """What one server answered, and its pool: tokens it holds, and bytes of each rank for them."""

    answers: list[Generation]
    kv_tokens: int
    kv_bytes: int
    seconds_per_token: float

    @property
    def tokens_per_mib(self) -> float:
        """Tokens of the pool for a MiB of each rank's memory."""
        return self.kv_tokens / (self.kv_bytes / 2**20)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; returns 1 when any token differs, else 0."""
    parser = argparse.ArgumentParser(prog="./dev demo", description=__doc__)
    parser.add_argument("--tp", type=int, default=8, help="ranks (default 8; 2 is faster)")
    parser.add_argument("--dcp-size", type=int, help="ranks that share a cache (default: all)")
    parser.add_argument("--dcp-comm-backend", default="a2a", choices=("a2a", "ag_rs"))
    parser.add_argument("--families", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--picture", type=Path, default=Path("demo.png"), help="default: demo.png")
    parser.add_argument(
        "--real", action="store_true", help="chat with a real model of 135M, 93 MB from PyPI"
    )
    options = parser.parse_args(argv)
    if options.real:
        return demo_real.main()
    acts = acts_of(options)
    Server.forks = True  # SGLang is imported once, for all servers
    progress = Progress({describe(act): act.seconds for act in acts}, begin=25)
    runs: dict[Act, Run] = {}
    with tempfile.TemporaryDirectory() as folder:
        for act in acts:
            with progress.step(describe(act)):
                checkpoint = Path(folder, act.family)
                if not checkpoint.exists():
                    make_checkpoint(act.family, checkpoint)
                runs[act] = serve(checkpoint, act, progress)
    equal = print_runs(runs)
    draw([panel(act, run) for act, run in runs.items()], options.picture)
    print("\nTimes are of a CPU reference and say nothing about speed on a GPU.")
    print(f"Who holds which tokens, and what a MiB of a rank holds: {options.picture}")
    return int(not equal)


def acts_of(options: argparse.Namespace) -> list[Act]:
    """Plain, sharded, and the first model once more on two nodes, where its ranks are even."""
    tp, dcp = options.tp, options.dcp_size or options.tp
    acts = [
        Act(family, tp, size, options.dcp_comm_backend, 1)
        for family in options.families
        for size in (1, dcp)
    ]
    if tp % 2 == 0:
        acts.append(acts[1]._replace(nodes=2))
    return acts


def describe(act: Act) -> str:
    """The act in words."""
    return f"{act.family} ({MODELS[act.family]}), {act.layout}"


def serve(checkpoint: Path, act: Act, progress: Progress) -> Run:
    """Start a server with the flags, send every prompt alone and then all at once."""
    nodes = f" --nnodes {act.nodes}, twice" if act.nodes > 1 else ""
    progress.say(f"python -m sglang.launch_server {' '.join(act.flags)}{nodes}")
    with Server(checkpoint, *act.flags, nodes=act.nodes, progress=progress.say) as server:
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


def print_runs(runs: dict[Act, Run]) -> bool:
    """Print each run beside plain tensor parallelism; whether all tokens are equal."""
    rows: list[tuple[str, ...]] = [HEAD]
    plain = {act.family: run for act, run in runs.items() if act.dcp == 1}
    all_equal = True
    for act, run in runs.items():
        tokens, error = "", ""
        if act.dcp > 1:
            equal, difference = compare(run.answers, plain[act.family].answers)
            all_equal &= equal
            tokens, error = "equal" if equal else "DIFFERENT", f"{difference:.1e}"
        model = f"{act.family} ({MODELS[act.family]})"
        held = (str(run.kv_tokens), f"{run.tokens_per_mib:.0f}")
        time_per_token = f"{run.seconds_per_token * 1e3:.0f} ms"
        rows.append((model, act.layout, *held, tokens, error, time_per_token))
    print_table(rows)
    return all_equal


def panel(act: Act, run: Run) -> Panel:
    """What the picture shows of a run."""
    config = FAMILIES[act.family].config
    # MLA's latent is one, for all heads.
    heads = 1 if "kv_lora_rank" in config else config["num_key_value_heads"]
    name = f"{act.family} ({MODELS[act.family]})"
    return Panel(name, act.layout, act.tp, act.dcp, act.nodes, heads, run.tokens_per_mib)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows, the first of them a head, in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * width for width in widths]
    for row in (rows[0], rule, *rows[1:]):
        cells = zip(row, widths, strict=True)
        print("  ".join(cell.ljust(width) for cell, width in cells).rstrip())


if __name__ == "__main__":
    sys.exit(main())
