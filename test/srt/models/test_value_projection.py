"""MLA's values projected before the exchange: right on both sides of the switch."""

from pathlib import Path
from typing import Any

import pytest
from sglang_cpu_reference import drafts
from sglang_cpu_reference.checkpoints import make_checkpoint
from sglang_helix.srt.layers.dcp.exchange import Exchanger
from srt.expected import check_all, prompt
from srt.fresh import Fresh
from srt.models.serving import Report, answer_all, command_line, scheduler_of

FROM = 3
BATCHES = (
    (prompt(9, seed=1), prompt(1, seed=2)),
    (prompt(30, seed=3), prompt(1, seed=4), prompt(19, seed=5)),
)
NEW_TOKENS = 4


def switch_at(tokens: int) -> None:
    """In a rank's process: project first from so many tokens on."""
    from sglang_helix.srt.models import value_projection
    from sglang_helix.srt.models.value_switch import Switch

    value_projection.switch = lambda: Switch(tokens, None)  # type: ignore[assignment]


def serving(
    rank: int, argv: list[str], from_tokens: int, batches: Any
) -> tuple[Report, set[tuple[int, int]]]:
    """Answers, and what was exchanged on the way: tokens and width."""
    exchanged = set()
    exchange = Exchanger.__call__

    def noting(exchanger: Exchanger, partial: Any, *args: Any, **kwargs: Any) -> Any:
        exchanged.add((len(partial.out), partial.out.shape[-1]))
        return exchange(exchanger, partial, *args, **kwargs)

    scheduler = scheduler_of(rank, argv)
    switch_at(from_tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Exchanger, "__call__", noting)
        return answer_all(scheduler, batches, NEW_TOKENS), exchanged


def serve_and_check(
    processes: Fresh, model: Path, tp: int, *flags: str, from_tokens: int = FROM
) -> set[tuple[int, int]]:
    """What the ranks have exchanged, who answer as transformers."""
    argv = command_line(model, tp, "--dcp-replicate-v-proj", "--max-total-tokens", "512", *flags)
    found: set[tuple[int, int]] = set()
    for report, exchanged in processes.ranks(serving, tp, argv, from_tokens, BATCHES):
        check_all(model, BATCHES, report.answers, NEW_TOKENS)
        found |= exchanged
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        "deepseek_v2", tmp_path_factory.mktemp("checkpoint"), num_hidden_layers=2
    )


def projected(exchanged: set[tuple[int, int]], model: Path) -> dict[bool, set[int]]:
    """Tokens of passes that were projected before the exchange, and of the others."""
    import json

    config = json.loads((model / "config.json").read_text())
    widths = {config["v_head_dim"]: True, config["kv_lora_rank"]: False}
    by_order: dict[bool, set[int]] = {True: set(), False: set()}
    for tokens, width in exchanged:
        by_order[widths[width]].add(tokens)
    return by_order


@pytest.mark.parametrize(
    ("tp", "flags"),
    [
        (2, ("--dcp-size", "2", "--dcp-comm-backend", "a2a")),
        (4, ("--dcp-size", "4", "--dcp-comm-backend", "a2a")),
        (4, ("--attn-tp-size", "2", "--dcp-comm-backend", "ag_rs")),
    ],
    ids=["K 2", "K 4", "A 2, ag_rs"],
)
def test_both_sides_of_the_switch_equal_transformers(
    ready: Fresh, checkpoint: Path, tp: int, flags: tuple[str, ...]
) -> None:
    found = projected(serve_and_check(ready, checkpoint, tp, *flags), checkpoint)
    assert found[True] == {3}


def test_base_2_of_flashinfer(kernels: Fresh, tmp_path: Path) -> None:
    model = make_checkpoint("deepseek_v2", tmp_path, num_hidden_layers=2)
    flags = ("--attn-tp-size", "1", "--attention-backend", "flashinfer")
    found = projected(serve_and_check(kernels, model, 2, *flags), model)
    assert found[True] == {3}


def test_verify_passes(ready: Fresh, tmp_path: Path) -> None:
    """By the tokens of the pass: 4 of each request, its drafts among them."""
    target, _ = drafts.make_mtp(tmp_path)
    flags = ("--dcp-size", "2", "--speculative-algorithm", "NEXTN")
    flags += ("--speculative-num-steps", "3", "--speculative-eagle-topk", "1")
    flags += ("--speculative-num-draft-tokens", "4", "--page-size", "1")
    found = projected(serve_and_check(ready, target, 2, *flags, from_tokens=12), target)
    assert found[True] == {12}
