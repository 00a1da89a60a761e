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
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from sglang_helix import cost

from benchmark.dcp import held, made, report
from benchmark.dcp.kernels import device_name
from benchmark.dcp.layouts import (
    COMMS,
    DID_NOT_START,
    FAILED,
    GATHERED,
    MARK,
    MEASURED,
    PREFIXES,
    REPLICATED,
    Layout,
    Row,
    parse_layout,
)
from benchmark.dcp.load import Client, Load, RequestError, measure, obstacle
from benchmark.dcp.serve_report import HEAD, capacity, plot, size, table_line, time_per_token

_LAUNCHER = "sglang.launch_server"
_CPU_SERVER = ("--max-total-tokens", "256", "--page-size", "8")


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
                queries=queries_of(info, ours=not options.url),
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
        held_until=hold,
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

    print(HEAD, flush=True)
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
        "queries": "",
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


def queries_of(info: dict[str, Any], *, ours: bool) -> str:
    """Where a server's queries come from; ours: its environment is this process's."""
    if int(info.get("dcp_size") or 1) == 1:
        return ""
    if info.get("dcp_replicate_q_proj"):
        return REPLICATED
    return cost.gathers(str(info["dcp_comm_backend"])) if ours else GATHERED


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
    parser.add_argument(
        "--start-timeout",
        type=float,
        default=3600,
        help="seconds for one server to start, with --together from its turn on",
    )
    report.add_files(parser)
    options = parser.parse_args(own)
    if options.from_csv:
        rows = [row for path in options.from_csv for row in report.read_csv(path, Row)]
        print("\n".join([HEAD, *map(table_line, rows)]))
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
    layouts = options.layouts or (["tp", "a2a"] if small else ["tp", *COMMS, "attn-tp:2"])
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
