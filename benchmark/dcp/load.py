"""The load of `benchmark.dcp serve` on one server, and what its tokens took."""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

from benchmark.dcp import made
from benchmark.dcp.layouts import DOES_NOT_FIT, TOO_LONG, TOO_MANY
from benchmark.dcp.measure import Timing
from benchmark.dcp.serve_report import size

_WARM_UP = made.COMPUTED  # tokens of a prompt
_SPARE = 6  # tokens that SGLang keeps of its pool beside a prompt


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
