"""Whole servers: plain tensor parallelism beside the layouts of the series.

    python -m benchmark.dcp serve --model MODEL --layouts tp ag_rs a2a symm attn-tp:2
    python -m benchmark.dcp serve --model MODEL -- --mem-fraction-static 0.85    flags for servers
    python -m benchmark.dcp serve --model MODEL --layouts tp@fa3 symm@fa3 --together
    python -m benchmark.dcp serve --url http://127.0.0.1:30000                   one that runs
    python -m benchmark.dcp serve --cpu                                          a small one

Layouts: `tp`; `ag_rs[:K]`, `a2a[:K]`, `symm[:K]`, that exchange with --dcp-size K (default: all
ranks); `attn-tp:A[:COMM]`, --attn-tp-size A with that exchange (default: a2a); behind each,
`@BACKEND` names an attention backend. For each context length and concurrency, that many requests
are sent at once and their tokens timed as the server streams them.

Most of a server's start is imports. --together starts all servers at once and holds each before
its process groups until its turn, so that a further one costs some 20 s in place of minutes.

Time per token is taken from the gaps between a request's tokens; TTFT is the wait for its first
one. A context of n tokens comes about in one of four ways, and the report says which:

    shared   one request prefills it before the clock starts; all requests find it in the prefix
             cache. Attention then reads one context's rows for all of them, and what the L2 still
             holds of it comes for less than in a real load: a lower bound on time per token
    own      each request's own context is prefilled so, one after the other
    cold     each request's own context is prefilled on the clock
    made     each request's own context is in the prefix cache, and nobody computed it: random
             keys and values, so the tokens mean nothing and their times are those of a real load.
             The server is started by `benchmark.dcp.made`, which puts it there

Lengths rise, and a shorter context is the beginning of the longer one, so `shared` and `own`
prefill each token once per server. SGLang can also decode over a cache that nobody computed
(--disaggregation-mode decode with the fake transfer backend), but the series serves no such
transfer, so the layouts could not be compared.

Two traps. A larger pool admits more prefill, which starves decode: every layout is measured
without --prefill-decode-interval and with it (--intervals; it tells most with --prefix cold). And
a layout whose cache cannot hold the contexts of all requests is not slow: it says "does not fit",
and shows no time, also where a shared context would fit.

Servers that draft (`-- --speculative-algorithm ...`) are timed alike; what came of it is printed
beside: tokens of each verify pass, on average.

Without a GPU a tiny model is served on the CPU. There, and where --launcher lets more ranks than
GPUs share them, every line is marked "function only".
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from sglang_helix.srt.layers.dcp.exchange import BACKENDS

from benchmark.dcp import held, made, report
from benchmark.dcp.kernels import device_name
from benchmark.dcp.measure import Timing

MARK = "function only"
MEASURED, DOES_NOT_FIT = "measured", "does not fit"
DID_NOT_START, FAILED = "did not start", "failed"
TOO_LONG, TOO_MANY = "beyond --context-length", "beyond --max-running-requests"
PREFIXES = ("shared", "own", "cold", "made")
_WARM_UP = made.COMPUTED  # tokens of a prompt
_SPARE = 6  # tokens that SGLang keeps of its pool beside a prompt
_COMMS = tuple(BACKENDS)
_LAUNCHER = "sglang.launch_server"
_CPU_SERVER = ("--max-total-tokens", "256", "--page-size", "8")


@dataclass(frozen=True)
class Row:
    """One layout at one size; no times where status is not "measured"."""

    layout: str
    tp_size: int
    dcp_size: int | None
    comm: str
    prefill_decode_interval: int
    prefix: str
    context: int
    concurrency: int
    status: str
    tpot_p10_ms: float | None
    tpot_median_ms: float | None
    tpot_p90_ms: float | None
    longest_gap_ms: float | None
    """Between two tokens of one request: where prefill starves decode, it shows here first."""
    ttft_median_ms: float | None
    tokens_per_s: float | None
    """Output tokens of all requests, from the first request to the last token."""
    output_tokens: int | None
    cached_tokens: int | None
    """Of a prompt, found in the prefix cache; the fewest of all requests."""
    kv_tokens: int | None
    """Capacity of the cache, over all ranks that split a sequence."""
    kv_bytes: int | None
    """Size of the cache on each rank; only servers with the series say."""
    needed_tokens: int | None
    """Of capacity, for all requests with contexts of their own."""
    mark: str
    model: str
    device: str


class Layout(NamedTuple):
    name: str
    flags: tuple[str, ...]


def parse_layout(text: str, tp_size: int) -> Layout:
    """Flags of a layout by name; raises ValueError with what is allowed."""
    layout, named, backend = text.partition("@")
    attention = ("--attention-backend", backend) if named else ()
    name, *rest = layout.split(":")
    size, comm = [*rest, "", ""][:2]
    if size and not size.isdecimal():
        raise ValueError(f"--layouts {text}: {size!r} is not a number of ranks")
    if layout == "tp":
        return Layout(text, attention)
    if name in _COMMS and len(rest) < 2:
        sharded = ("--dcp-size", size or str(tp_size), "--dcp-comm-backend", name)
        return Layout(text, sharded + attention)
    if name == "attn-tp" and size and len(rest) < 3 and comm in ("", *_COMMS):
        sharded = ("--attn-tp-size", size, "--dcp-comm-backend", comm or "a2a")
        return Layout(text, sharded + attention)
    raise ValueError(
        f"--layouts {text}: use tp, ag_rs[:K], a2a[:K], symm[:K] or attn-tp:A[:COMM], with "
        "@BACKEND behind it for an attention backend"
    )


# --- one server ---------------------------------------------------------------------------------


class RequestError(RuntimeError):
    """The server did not answer a request as it was asked to."""


class Answer(NamedTuple):
    sent: float
    arrivals: list[tuple[float, int]]
    """When a piece arrived, and the tokens so far."""
    cached_tokens: int
    passes: int = 0
    """That verified drafts, where the server drafts."""

    @property
    def gaps(self) -> list[float]:
        """Seconds before each token but those of the first piece."""
        return [
            (after - before) / (count - earlier)
            for (before, earlier), (after, count) in itertools.pairwise(self.arrivals)
            for _ in range(count - earlier)
        ]


class Client:
    """SGLang's HTTP interface, at a base URL."""

    def __init__(self, url: str, timeout: float) -> None:
        self.url, self.timeout = url.rstrip("/"), timeout
        self.info: dict[str, Any] = json.loads(self._open("/server_info").read())

    @property
    def unit(self) -> int:
        """Tokens that the cache gives out together: a page on each rank that splits a sequence."""
        return int(self.info["page_size"]) * int(self.info.get("dcp_size") or 1)

    @property
    def kv_tokens(self) -> int:
        return int(self.info["max_total_num_tokens"])

    @property
    def kv_bytes(self) -> int | None:
        return (self.info.get("sglang_helix") or {}).get("kv_bytes")

    @property
    def most_requests(self) -> int:
        return int(self.info["internal_states"][0]["effective_max_running_requests_per_dp"])

    def flush_cache(self) -> None:
        self._open("/flush_cache?timeout=30", {}).read()

    def complete(
        self, prompt: Sequence[int], new_tokens: int, together: threading.Barrier | None = None
    ) -> Answer:
        """Stream a greedy completion of exactly so many tokens; sent when all are ready."""
        sampling = {"temperature": 0, "ignore_eos": True, "max_new_tokens": new_tokens}
        body = {"input_ids": list(prompt), "stream": True, "sampling_params": sampling}
        request = self._request("/generate", body)
        if together:
            together.wait(self.timeout)
        sent = time.perf_counter()
        arrivals: list[tuple[float, int]] = []
        with self._open(request) as stream:
            for line in stream:
                now = time.perf_counter()
                if not line.startswith(b"data: {"):
                    continue
                piece = json.loads(line[len(b"data: ") :])
                if "error" in piece:
                    raise RequestError(f"the server answered {piece['error']}")
                meta = piece["meta_info"]
                reason = meta["finish_reason"] or {}
                if reason.get("type") == "abort":
                    raise RequestError(f"the server aborted: {reason.get('message')}")
                if not arrivals or meta["completion_tokens"] > arrivals[-1][1]:
                    arrivals.append((now, meta["completion_tokens"]))
        got = arrivals[-1][1] if arrivals else 0
        if got != new_tokens:
            raise RequestError(f"the server sent {got} tokens of {new_tokens}")
        return Answer(sent, arrivals, meta["cached_tokens"], meta.get("spec_verify_ct") or 0)

    def complete_together(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Answer]:
        """One thread per request; all are sent at the same moment."""
        together = threading.Barrier(len(prompts))
        with ThreadPoolExecutor(len(prompts)) as pool:
            running = [pool.submit(self.complete, p, new_tokens, together) for p in prompts]
            return [request.result() for request in running]

    def _request(self, path: str, body: Any) -> urllib.request.Request:
        return urllib.request.Request(
            self.url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )

    def _open(self, request: urllib.request.Request | str, body: Any = None) -> Any:
        if isinstance(request, str):
            request = self._request(request, body)
        try:
            return urllib.request.urlopen(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            told = error.read().decode(errors="replace")
            raise RequestError(f"{request.full_url} answered {error.code}: {told}") from error
        except OSError as error:
            raise RequestError(f"{request.full_url} did not answer: {error}") from error


@dataclass(frozen=True)
class Load:
    """Requests that are sent together."""

    context: int
    concurrency: int
    new_tokens: int
    prefix: str

    def prompts(self) -> list[list[int]]:
        """Random bytes; each prompt ends in a token of its own, shared context or not.

        Shorter contexts of the same prefix are beginnings of longer ones.
        """
        drawn = [
            random.Random(seed).choices(range(256), k=self.context - 1)
            for seed in range(1 if self.prefix == "shared" else self.concurrency)
        ]
        return [[*drawn[i % len(drawn)], i % 256] for i in range(self.concurrency)]

    def needed_tokens(self, unit: int) -> int:
        """Capacity for contexts of their own, in whole units of the cache.

        One unit more for each: SGLang admits a request only while so much would stay free.
        """
        return self.concurrency * (-(-(self.context + self.new_tokens) // unit) + 1) * unit


def obstacle(client: Client, load: Load) -> str | None:
    """Why a load says nothing about the server's speed, or None."""
    if (
        load.needed_tokens(client.unit) > client.kv_tokens
        or load.context >= client.kv_tokens - _SPARE
    ):
        return DOES_NOT_FIT
    if load.context >= client.info["max_req_input_len"]:
        return TOO_LONG
    if load.concurrency > client.most_requests:
        return TOO_MANY
    return None


def measure(client: Client, load: Load) -> dict[str, Any]:
    """Make the contexts, send the load, and return the figures of a Row."""
    prompts = load.prompts()
    # What a batch of this size compiles or connects at its first time.
    client.complete_together([prompt[:_WARM_UP] for prompt in prompts], 4)
    if load.prefix == "cold":
        client.flush_cache()
    elif load.prefix != "made":
        for prompt in prompts[:1] if load.prefix == "shared" else prompts:
            client.complete(prompt, 1)
    answers = client.complete_together(prompts, load.new_tokens)
    if not ran_together(answers):
        print(f"{size(load.context)}, {load.concurrency} requests: they did not decode together")
    gaps = Timing([1e3 * gap for answer in answers for gap in answer.gaps])
    first, last = min(a.sent for a in answers), max(a.arrivals[-1][0] for a in answers)
    tokens = sum(answer.arrivals[-1][1] for answer in answers)
    if passes := sum(answer.passes for answer in answers):
        each = (tokens - len(answers)) / passes  # a prompt's own pass brings the first
        print(f"{size(load.context)}, {load.concurrency} requests: {each:.2f} tokens a verify pass")
    return {
        "tpot_p10_ms": gaps.p10,
        "tpot_median_ms": gaps.median,
        "tpot_p90_ms": gaps.p90,
        "longest_gap_ms": max(gaps.samples),
        "ttft_median_ms": 1e3 * median(a.arrivals[0][0] - a.sent for a in answers),
        "tokens_per_s": tokens / (last - first),
        "output_tokens": tokens,
        "cached_tokens": min(answer.cached_tokens for answer in answers),
    }


def ran_together(answers: Sequence[Answer]) -> bool:
    """Whether all requests were decoding at some moment: none waited for another's end."""
    return max(a.arrivals[0][0] for a in answers) < min(a.arrivals[-1][0] for a in answers)


def measure_server(client: Client, name: str, options: argparse.Namespace) -> Iterator[Row]:
    """Each length, rising, at each concurrency."""
    info = client.info
    if int(info.get("dp_size") or 1) > 1:
        raise SystemExit("--dp-size: capacity is that of one replica; measure a server without")
    prefix = options.prefix
    if prefix != "cold" and info["disable_radix_cache"]:
        print(f"{name}: the prefix cache is off, so contexts are prefilled on the clock: cold")
        prefix = "cold"
    on_cpu = info["device"] == "cpu"
    dcp_size = int(info.get("dcp_size") or 1)
    for context in sorted(options.contexts):
        for concurrency in options.concurrency:
            load = Load(context, concurrency, options.new_tokens, prefix)
            status = obstacle(client, load)
            figures: dict[str, Any] = {}
            if status is None:
                try:
                    figures, status = measure(client, load), MEASURED
                except RequestError as error:
                    status = FAILED
                    print(f"{name} at {size(context)}, {concurrency} requests: {error}")
            row = Row(
                layout=name,
                tp_size=int(info["tp_size"]),
                dcp_size=dcp_size,
                comm=str(info["dcp_comm_backend"]) if dcp_size > 1 else "",
                prefill_decode_interval=int(info.get("prefill_decode_interval") or 0),
                prefix=prefix,
                context=context,
                concurrency=concurrency,
                status=status,
                **{**dict.fromkeys(_FIGURES), **figures},
                kv_tokens=client.kv_tokens,
                kv_bytes=client.kv_bytes,
                needed_tokens=load.needed_tokens(client.unit),
                mark=MARK if on_cpu else options.mark,
                model=str(info["model_path"]),
                device="CPU" if on_cpu else options.device,
            )
            found = row.cached_tokens
            # The token that differs, and what does not fill a unit, is prefilled by each request.
            if prefix != "cold" and found is not None and found < context - 1 - client.unit:
                print(
                    f"{name} at {size(context)}: only {found} tokens were in the prefix cache; the "
                    "rest was prefilled on the clock"
                )
            yield row


_FIGURES = (
    "tpot_p10_ms",
    "tpot_median_ms",
    "tpot_p90_ms",
    "longest_gap_ms",
    "ttft_median_ms",
    "tokens_per_s",
    "output_tokens",
    "cached_tokens",
)


# --- servers ------------------------------------------------------------------------------------


@contextmanager
def started(
    layout: Layout, interval: int, options: argparse.Namespace, hold: Path | None = None
) -> Iterator[str]:
    """A server of the layout; its URL. With `hold`, it goes on only once that file is there."""
    from sglang_cpu_reference import PLATFORM_NAME
    from sglang_cpu_reference.server import Server

    flags = ["--tp-size", str(options.tp), *layout.flags]
    if interval:
        flags += ["--prefill-decode-interval", str(interval)]
    environment = {"HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "0")}
    if hold:
        environment |= {held.FILE: str(hold), held.MADE: str(int(options.prefix == "made"))}
    server = Server(
        options.model,
        *flags,
        *(_CPU_SERVER if options.cpu else ()),
        *options.server_flags,
        platform=PLATFORM_NAME if options.cpu else None,
        env=environment,
        start_timeout=options.start_timeout,
    )
    server.command[server.command.index(_LAUNCHER)] = options.launcher
    with server:
        yield f"http://127.0.0.1:{server.port}"


class Turns:
    """Servers that start together, each held before its process groups until its turn comes."""

    def __init__(self, servers: Sequence[tuple[Layout, int]], options: argparse.Namespace) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._done = [threading.Event() for _ in servers]
        self._urls: list[Future[str]] = [Future() for _ in servers]
        # A server lives no longer than the thread that started it.
        self._threads = [
            threading.Thread(target=self._serve, args=(number, *server, options))
            for number, server in enumerate(servers)
        ]
        for thread in self._threads:
            thread.start()

    def _serve(
        self, number: int, layout: Layout, interval: int, options: argparse.Namespace
    ) -> None:
        try:
            with started(layout, interval, options, self._file(number)) as url:
                self._urls[number].set_result(url)
                self._done[number].wait()
        except Exception as error:  # raised again where the turn is taken
            if not self._urls[number].done():
                self._urls[number].set_exception(error)

    def _file(self, number: int) -> Path:
        return Path(self._folder.name, str(number))

    @contextmanager
    def take(self, number: int) -> Iterator[str]:
        """Let one server go on, until it answers; its URL. It ends before the next may begin."""
        self._file(number).touch()
        try:
            yield self._urls[number].result()
        finally:
            self._done[number].set()
            self._threads[number].join()

    def __enter__(self) -> Turns:
        return self

    def __exit__(self, *_exc: object) -> None:
        for number, done in enumerate(self._done):
            done.set()
            self._file(number).touch()
        for thread in self._threads:
            thread.join()
        self._folder.cleanup()


def run(options: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []

    def keep(row: Row) -> None:
        rows.append(row)
        print(table_line(row), flush=True)
        if options.csv:  # each at once: hours may lie behind it
            report.write_csv(rows, options.csv, Row)

    print(_HEAD, flush=True)
    if options.url:
        try:
            client = Client(options.url, options.timeout)
        except RequestError as error:
            raise SystemExit(f"--url {options.url}: {error}") from error
        for row in measure_server(client, name_of(client.info), options):
            keep(row)
        return rows
    from sglang_cpu_reference.server import ServerError

    servers = list(itertools.product(options.layouts, options.intervals))
    with Turns(servers, options) if options.together else nullcontext() as turns:
        for number, (layout, interval) in enumerate(servers):
            try:
                with turns.take(number) if turns else started(layout, interval, options) as url:
                    client = Client(url, options.timeout)
                    for row in measure_server(client, layout.name, options):
                        keep(row)
            except ServerError as error:
                print(f"{layout.name} {DID_NOT_START}: {reason_of(error)}")
                for context in sorted(options.contexts):
                    for concurrency in options.concurrency:
                        keep(not_started(layout, interval, context, concurrency, options))
    return rows


def not_started(
    layout: Layout, interval: int, context: int, concurrency: int, options: argparse.Namespace
) -> Row:
    known = {
        "layout": layout.name,
        "tp_size": options.tp,
        "comm": "",
        "prefill_decode_interval": interval,
        "prefix": options.prefix,
        "context": context,
        "concurrency": concurrency,
        "status": DID_NOT_START,
        "mark": options.mark,
        "model": str(options.model),
        "device": options.device,
    }
    return Row(**{**dict.fromkeys(f.name for f in fields(Row)), **known})


def reason_of(error: Exception) -> str:
    """The last line of a server's log that names an error, else all that is known."""
    lines = str(error).splitlines()
    return next((line.strip() for line in reversed(lines) if "Error" in line), str(error))


def name_of(info: dict[str, Any]) -> str:
    """The layout of a running server, in the words of --layouts."""
    dcp_size = int(info.get("dcp_size") or 1)
    if dcp_size == 1:
        return "tp"
    comm = info["dcp_comm_backend"]
    if info.get("dcp_replicate_q_proj"):
        return f"attn-tp:{int(info['tp_size']) // dcp_size}:{comm}"
    return f"{comm}:{dcp_size}"


# --- report -------------------------------------------------------------------------------------

_HEAD = (
    f"{'layout':<20}{'interval':>9} {'prefix':<7}{'context':>8}{'requests':>9}{'ms/token':>10}"
    f"{'p10':>9}{'p90':>9}{'longest':>10}{'TTFT ms':>10}{'tokens/s':>10}{'cached':>9}"
    f"{'KV tokens':>11}{'KV size':>12}"
)


def size(tokens: int) -> str:
    """262144 -> 256K"""
    for unit, factor in (("M", 1 << 20), ("K", 1 << 10)):
        if tokens >= factor and tokens % factor == 0:
            return f"{tokens // factor}{unit}"
    return str(tokens)


def table_line(row: Row) -> str:
    where = (
        f"{row.layout:<20}{row.prefill_decode_interval:>9} {row.prefix:<7}{size(row.context):>8}"
        f"{row.concurrency:>9}"
    )
    if row.status == MEASURED:
        what = (
            f"{row.tpot_median_ms:>10.2f}{row.tpot_p10_ms:>9.2f}{row.tpot_p90_ms:>9.2f}"
            f"{row.longest_gap_ms:>10.2f}"
            f"{row.ttft_median_ms:>10.1f}{row.tokens_per_s:>10.1f}{row.cached_tokens:>9}"
        )
    else:
        what = f"  {row.status:<65}"
    tokens = "-" if row.kv_tokens is None else row.kv_tokens
    return f"{where}{what}{tokens:>11}{_bytes(row.kv_bytes):>12}  {row.mark}".rstrip()


def _bytes(count: int | None) -> str:
    if count is None:
        return "-"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def time_per_token(rows: Sequence[Row]) -> str:
    """Contexts against layouts, a table for each concurrency and interval."""
    lines = []
    for concurrency, interval in dict.fromkeys(
        (row.concurrency, row.prefill_decode_interval) for row in rows
    ):
        lines.append(
            f"\nTime per output token in ms, median (p10 to p90), {concurrency} requests, "
            + (f"--prefill-decode-interval {interval}" if interval else "no prefill interval")
        )
        chosen = {
            (row.context, row.layout): row
            for row in rows
            if (row.concurrency, row.prefill_decode_interval) == (concurrency, interval)
        }
        layouts = list(dict.fromkeys(layout for _, layout in chosen))
        lines.append(f"{'context':<9}" + "".join(f"{layout:>26}" for layout in layouts))
        for context in sorted({context for context, _ in chosen}):
            cells = [chosen.get((context, layout)) for layout in layouts]
            marks = {row.mark for row in cells if row}
            line = f"{size(context):<9}" + "".join(f"{_cell(row):>26}" for row in cells)
            lines.append(f"{line}  {' '.join(sorted(marks))}".rstrip())
    return "\n".join(lines)


def _cell(row: Row | None) -> str:
    if row is None or row.status != MEASURED:
        return "-" if row is None else row.status
    return f"{row.tpot_median_ms:.2f} ({row.tpot_p10_ms:.2f} to {row.tpot_p90_ms:.2f})"


def capacity(rows: Sequence[Row]) -> str:
    """What each layout's cache holds, and how many requests of each length fit in it together."""
    lines = ["\nCapacity of the KV cache"]
    for layout in dict.fromkeys(row.layout for row in rows if row.kv_tokens is not None):
        own = [row for row in rows if row.layout == layout and row.kv_tokens is not None]
        held = {
            row.context: row.kv_tokens // (row.needed_tokens // row.concurrency)  # type: ignore
            for row in own
        }
        requests = ", ".join(f"{count} of {size(length)}" for length, count in held.items())
        size_of_rank = f"{_bytes(own[0].kv_bytes)} on each rank"
        line = f"{layout:<20}{own[0].kv_tokens} tokens, {size_of_rank}; at once: {requests}"
        lines.append(f"{line}  {own[0].mark}".rstrip())
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path) -> str:
    """Time per token and throughput against the context; returns what was done."""
    plots = report.pyplot()
    if plots is None:
        return report.no_plot("serve", path)
    panels = list(dict.fromkeys(row.concurrency for row in rows))
    names = list(dict.fromkeys(row.layout for row in rows))
    colours = plots.get_cmap("tab10")
    contexts = sorted({row.context for row in rows})
    figure, axes = plots.subplots(
        len(panels), 2, figsize=(12, 4.2 * len(panels)), squeeze=False, layout="constrained"
    )
    for concurrency, (latency, throughput) in zip(panels, axes, strict=True):
        panel = [row for row in rows if row.concurrency == concurrency]
        for name, interval in dict.fromkeys((r.layout, r.prefill_decode_interval) for r in panel):
            line = [r for r in panel if (r.layout, r.prefill_decode_interval) == (name, interval)]
            absent = [size(r.context) for r in line if r.status == DOES_NOT_FIT]
            label = name + (f", interval {interval}" if interval else "")
            if absent:
                label += f" ({DOES_NOT_FIT}: {', '.join(absent)})"
            line = [r for r in line if r.status == MEASURED]
            style = {
                "label": label,
                "color": colours(names.index(name)),
                "linestyle": "--" if interval else "-",
                "marker": "o",
                "markersize": 4,
            }
            at = [r.context for r in line]
            latency.plot(at, [r.tpot_median_ms for r in line], **style)
            low, high = [r.tpot_p10_ms for r in line], [r.tpot_p90_ms for r in line]
            latency.fill_between(at, low, high, color=style["color"], alpha=0.15)
            throughput.plot(at, [r.tokens_per_s for r in line], **style)
        latency.set(ylabel="ms per output token, p10 to p90")
        throughput.set(ylabel="output tokens per second")
        for axis in (latency, throughput):
            axis.set(
                xscale="log", xlabel="context", title=f"{concurrency} requests", ylim=(0, None)
            )
            axis.set_xlim(contexts[0] / 1.1, contexts[-1] * 1.1)
            axis.set_xticks(contexts, [size(context) for context in contexts])
            axis.xaxis.minorticks_off()
            axis.grid(alpha=0.3)
        latency.legend(fontsize=7)
    about = [rows[0].model, rows[0].device, f"{rows[0].prefix} contexts", rows[0].mark]
    figure.suptitle(", ".join(filter(None, about)))
    return report.save(figure, path)


def main(argv: list[str]) -> int:
    own, server_flags = argv, []
    if "--" in argv:
        own, server_flags = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.dcp serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--url", help="drive this server; else servers are started")
    parser.add_argument("--model", help="model directory or name")
    parser.add_argument("--layouts", nargs="+", metavar="LAYOUT")
    parser.add_argument("--tp", type=int, metavar="N", help="ranks; default: all GPUs")
    parser.add_argument("--contexts", nargs="+", type=int, metavar="TOKENS")
    parser.add_argument("--concurrency", nargs="+", type=int, metavar="REQUESTS")
    parser.add_argument("--new-tokens", type=int, help="output tokens of each request")
    parser.add_argument("--prefix", choices=PREFIXES, default="shared", help="default: shared")
    parser.add_argument(
        "--intervals",
        nargs="+",
        type=int,
        default=[0, 8],
        metavar="I",
        help="a server for each --prefill-decode-interval; 0: without; default: 0 8",
    )
    parser.add_argument("--cpu", action="store_true", help="a tiny model on the CPU")
    parser.add_argument(
        "--launcher",
        default=_LAUNCHER,
        metavar="MODULE",
        help="what starts a server in place of sglang.launch_server, for example so that ranks "
        "share a GPU",
    )
    parser.add_argument(
        "--together",
        action="store_true",
        help="start all servers at once, and let each go on when its turn comes",
    )
    parser.add_argument("--timeout", type=float, default=7200, help="seconds for one request")
    parser.add_argument("--start-timeout", type=float, default=3600, help="seconds for one server")
    parser.add_argument("--csv", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="write a PNG here; needs matplotlib")
    parser.add_argument(
        "--from-csv", nargs="+", type=Path, help="measure nothing, report on these figures together"
    )
    options = parser.parse_args(own)
    if options.from_csv:
        rows = [row for path in options.from_csv for row in report.read_csv(path, Row)]
        print("\n".join([_HEAD, *map(table_line, rows)]))
    else:
        options.server_flags = server_flags
        options.cpu = options.cpu or not (gpus or options.url)
        options.device = "CPU" if options.cpu else machine(gpus)
        complete(parser, options, gpus)
        with tempfile.TemporaryDirectory() as folder:
            if options.cpu and not options.url and not options.model:
                options.model = tiny_model(folder)
            print(_ABOUT[options.prefix])
            if options.mark:
                where = "on the CPU" if options.cpu else "whose ranks share GPUs"
                print(f"{options.mark}: servers {where}; these times say nothing of GPUs")
            rows = run(options)
    print(time_per_token(rows))
    print(capacity(rows))
    if options.csv:
        report.write_csv(rows, options.csv, Row)
        print(f"figures: {options.csv}")
    if options.plot:
        print(plot(rows, options.plot))
    return int(any(row.status in (DID_NOT_START, FAILED) for row in rows))


_ABOUT = {
    "shared": "contexts: one prefill, which all requests share through the prefix cache; their "
    "common rows may come from the L2, so times per token are lower bounds",
    "own": "contexts: each request's own, prefilled before the clock starts",
    "cold": "contexts: each request's own, prefilled token by token on the clock",
    "made": "contexts: each request's own, put into the prefix cache without being computed",
}


def complete(parser: argparse.ArgumentParser, options: argparse.Namespace, gpus: int) -> None:
    """Fill in what was not given, and refuse what cannot be."""
    if options.url:
        if options.layouts or options.model or options.tp or options.server_flags:
            parser.error("--url drives a server as it is: leave out what starts one")
    elif not (options.model or options.cpu):
        parser.error("--model is needed to start servers (or --url, or --cpu)")
    if options.prefix == "made" and (options.url or options.launcher != _LAUNCHER):
        parser.error(
            "--prefix made starts servers that put contexts into their cache: leave out --url and "
            "--launcher, or use --prefix own"
        )
    if options.together and (options.url or options.launcher != _LAUNCHER):
        parser.error("--together starts servers that wait: leave out --url and --launcher")
    if options.together:
        options.launcher = held.__name__
    elif options.prefix == "made":
        options.launcher = made.__name__
    small = options.cpu and not options.url
    options.tp = options.tp or (2 if small else gpus)
    options.mark = MARK if small or (not options.url and options.tp > gpus) else ""
    options.contexts = options.contexts or (
        [48, 160, 600] if small else [1 << 18, 1 << 19, 1 << 20]
    )
    options.concurrency = options.concurrency or ([2] if small else [8])
    options.new_tokens = options.new_tokens or (8 if small else 128)
    layouts = options.layouts or (["tp", "a2a"] if small else ["tp", *_COMMS, "attn-tp:2"])
    try:
        options.layouts = [parse_layout(text, options.tp) for text in layouts]
    except ValueError as error:
        parser.error(str(error))
    for name, least in (("contexts", 2), ("concurrency", 1), ("new_tokens", 3), ("intervals", 0)):
        value = getattr(options, name)
        lowest = min(value) if isinstance(value, list) else value
        if lowest < least:
            parser.error(f"--{name.replace('_', '-')} {lowest}: at least {least}")


def tiny_model(folder: str) -> Path:
    """One key-value head: every rank of plain TP keeps all of the cache, so sharding doubles it."""
    from sglang_cpu_reference.checkpoints import make_checkpoint

    return make_checkpoint("llama", Path(folder, "llama"), num_key_value_heads=1)


def machine(gpus: int) -> str:
    return f"{gpus} x {device_name(torch.device('cuda', 0))}" if gpus else "unknown"
