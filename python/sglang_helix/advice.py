"""What the cost model says in words: tables, lines for the log of a start, a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang_helix.cost import (
    VALUE_ELEMENT,
    Advice,
    Choice,
    Gpu,
    Model,
    first,
    fitted,
    gpu_called,
    model_of,
    step_ms,
    weight_bytes,
    weight_element_of,
)
from sglang_helix.layout import rows, values_bytes
from sglang_helix.srt.distributed.topology import Layout
from sglang_helix.srt.models.value_switch import switch

# The largest batch in which replicated queries are looked for to be faster than gathered ones.
_MOST_REQUESTS = 1 << 12


def on_queries(
    model: Model, layout: Layout, gpu: Gpu, exchange: str, weight_element: float = 2
) -> str:
    """What replicated queries cost a GPU beside gathered ones, in words, whatever the contexts."""
    row = next(row for row in rows(model.shape, layout.tp_size, 0, 2) if row.layout == layout)

    def saved(requests: int) -> float:
        gathered, replicated = (
            step_ms(
                model,
                Choice(row, exchange, replicated),
                gpu,
                fitted(),
                context=0,
                requests=requests,
                weight_element=weight_element,
                of_gpu=True,
            )
            for replicated in (False, True)
        )
        return gathered - replicated

    from_requests = first(lambda requests: saved(requests) > 0, _MOST_REQUESTS)
    if from_requests == 1:
        when = f"faster than to gather them at any batch, alone by {saved(1):.2f} ms a token"
    elif from_requests is None:
        when = f"slower than to gather them at any batch, alone by {-saved(1):.2f} ms a token"
    else:
        when = (
            f"faster than to gather them from {from_requests} requests at once on, and alone "
            f"{-saved(1):.2f} ms a token slower"
        )
    return f"to replicate queries is {when} (computed)"


def on_values(
    compared: Advice, layout: Layout, exchange: str, requests: Sequence[int]
) -> str | None:
    """What values projected before the exchange save, in words; None where it is never done."""
    row = next(one.row for one in compared.choices if one.row.layout == layout)
    behind, before = (Choice(row, exchange, False, values) for values in (False, True))

    def took(choice: Choice, count: int) -> float:
        return compared.ms(choice, 0, count, of_gpu=True)

    saved = [
        f"{took(behind, count) - took(before, count):.2f} ms with {count}"
        for count in requests
        if compared.model.value and switch().pays(count)
    ]
    if not saved:
        return None
    held = values_bytes(compared.model.shape, compared.model.value, layout, VALUE_ELEMENT)
    return (
        f"--dcp-replicate-v-proj takes {held / 2**30:.2f} GiB a rank and, with {exchange}, saves "
        f"a token {', '.join(saved)} at once (computed)"
    )


def on_start(
    layout: Layout, model_config: Any, device: str, exchange: str, replicated: bool
) -> list[str]:
    """A line for the log of a start; none for a GPU, an exchange or a model that nobody fitted.

    device: what CUDA calls the GPU. replicated: what this server does.
    """
    gpu = gpu_called(device)
    if gpu is None or exchange not in fitted().exchange:
        return []
    try:
        model = model_of(model_config)
    except (AttributeError, TypeError, ValueError):  # fields of a class that it was not made for
        return []
    element = weight_element_of(model_config)
    here = "replicated" if replicated else "gathered"
    says = on_queries(model, layout, gpu, exchange, element)
    return [f"Queries are {here} (--[no-]dcp-replicate-q-proj); {says}"]


def length(tokens: int) -> str:
    """4096 as 4K, 1048576 as 1M."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return str(tokens)


def table(compared: Advice, contexts: Sequence[int], requests: Sequence[int]) -> str:
    """Milliseconds per token as a Markdown table, and what follows from it, a line each."""
    places = [(context, count) for count in requests for context in contexts]
    layout, element = compared.choices[0].row.layout, compared.weight_element
    held = weight_bytes(compared.model, layout, False, None, element)
    lines = [
        f"Weights, counted from config.json: {held / 2**30:.1f} GiB a rank with plain TP. If the "
        "checkpoint says otherwise, so will the times.",
        "",
        "| ms per token, computed | KV tokens | largest batch of "
        + " / ".join(map(length, contexts))
        + " | "
        + " | ".join(f"{count} x {length(context)}" for context, count in places)
        + " |",
        "|---" * (len(places) + 3) + "|",
    ]
    for choice in compared.choices:
        cells = (
            f"{compared.ms(choice, context, count):.2f}"
            if compared.fits(choice, context) >= count
            else f"{compared.fits(choice, context)} fit"
            for context, count in places
        )
        tokens = f"{choice.row.kv_tokens:,}"
        largest = " / ".join(str(compared.fits(choice, context)) for context in contexts)
        lines.append(f"| {choice.flags} | {tokens} | {largest} | " + " | ".join(cells) + " |")
    lines.append("")
    for context, count in places:
        best = compared.best(context, count)
        says = best.flags if best else "no layout holds them"
        lines.append(f"- {count} x {length(context)}: {says}")
    if any(
        compared.ms(choice, *place) > compared.ms(choice, *place, of_gpu=True)
        for choice in compared.choices
        for place in places
    ):
        waits = ", ".join(f"{us / 1e3:.2f} ms {kind}" for kind, us in fitted().host.items())
        lines.append(
            f"- {waits}: what SGLang's scheduler took for a step where it was measured, the latter "
            "before captured graphs prepared themselves; GPUs that need less wait for it."
        )
    for count in requests:
        crossing = compared.crossing(count)
        lines.append(
            f"- With {count} at once a sharded cache is faster than plain TP "
            + (f"from {length(crossing)} tokens each on." if crossing else "at no length.")
        )
    for choice in compared.choices:
        if choice.replicated and choice.exchange == compared.exchange:
            by = compared.exchange
            says = on_queries(compared.model, choice.row.layout, compared.gpu, by, element)
            lines.append(f"- K = {choice.row.layout.kvp_size}, {by}: {says}.")
            if values := on_values(compared, choice.row.layout, by, requests):
                lines.append(f"- K = {choice.row.layout.kvp_size}: {values}.")
    return "\n".join(lines)


def plot(compared: Advice, contexts: Sequence[int], requests: Sequence[int], path: Path) -> None:
    """Milliseconds per token over context as a PNG, a panel for each number of requests.

    Of plain TP, and of each layout by the first of the exchanges compared.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # type: ignore[import-not-found,unused-ignore]

    figure = Figure(figsize=(5 * len(requests), 4), layout="constrained")
    for place, count in enumerate(requests):
        axes = figure.add_subplot(1, len(requests), place + 1)
        for choice in compared.choices:
            if choice.exchange in ("", compared.exchange):
                held = [n for n in contexts if compared.fits(choice, n) >= count]
                style = {"color": "black"} if not choice.exchange else {}
                axes.plot(
                    held, [compared.ms(choice, n, count) for n in held], label=choice.flags, **style
                )
        axes.set(xscale="log", xlabel="context of each request, tokens", ylim=(0, None))
        axes.set(title=f"{count} at once", ylabel="ms per token, computed")
        axes.set_xticks(contexts, [length(n) for n in contexts])
        axes.minorticks_off()
        axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=150)
