"""Prefixes in files, of latents and of K and V: what is lost or of another kind is never read."""

import json
from pathlib import Path

import pytest
from sglang_cpu_reference.checkpoints import make_checkpoint
from srt.expected import check, prompt
from srt.fresh import Fresh
from srt.models.serving import Answer, answer, command_line, scheduler_of, turn

NEW_TOKENS = 4
RANKS, PAGE = 2, 4
WIDE = RANKS * PAGE
#: Four pages of the group.
PROMPT = prompt(4 * WIDE + 1)
FLAGS = (
    *("--dcp-size", str(RANKS), "--dcp-comm-backend", "a2a", "--page-size", str(PAGE)),
    *("--max-total-tokens", "128", "--enable-hierarchical-cache", "--hicache-ratio", "2"),
    *("--hicache-write-policy", "write_through", "--hicache-storage-backend", "file"),
    *("--hicache-storage-prefetch-policy", "wait_complete", "--served-model-name", "name"),
    *("--hicache-storage-backend-extra-config", json.dumps({"prefetch_threshold": PAGE})),
)


def asked(rank: int, argv: list[str], files: Path, kind: str, loses: bool) -> list[Answer]:
    """In a rank's process: answers to the prompt, each when device and host have nothing of it.

    kind: what files of this server are named by. loses: once more, when the last rank has lost its
    share of the third page.
    """
    scheduler = scheduler_of(rank, argv)
    from sglang.srt.mem_cache.utils import get_hash_str
    from sglang.srt.runtime_context import get_parallel

    group, pages = get_parallel().tp_group, len(PROMPT) // WIDE
    third = get_hash_str(PROMPT[: pages * WIDE], page_size=WIDE)[2]

    def shares() -> list[Path]:
        return list(files.glob(f"*_{kind}_*_dcp{rank}_*"))

    def again() -> Answer:
        (answered,) = answer(scheduler, [PROMPT], NEW_TOKENS)
        while not all(group.all_gather_object(len(shares()) == pages)):
            turn(scheduler)
        assert scheduler.flush_cache()
        return answered

    answers = [again(), again()]
    if loses:
        if rank == RANKS - 1:
            (lost,) = (file for file in shares() if file.name.startswith(third))
            lost.unlink()
        group.barrier()
        answers.append(again())
    return answers


@pytest.mark.parametrize(
    ("family", "others", "kind"),
    [
        ("deepseek_v2", ("--kv-cache-dtype", "bfloat16"), "name-bfloat16-page_first_direct"),
        ("llama", ("--hicache-mem-layout", "layer_first"), "name-float32-layer_first"),
    ],
    ids=["latents, another dtype", "K and V, another memory layout"],
)
def test_files(
    ready: Fresh, tmp_path: Path, family: str, others: tuple[str, ...], kind: str
) -> None:
    """Whole pages come back, up to one that a rank lacks; none of a server of another kind."""
    model, files = make_checkpoint(family, tmp_path / "model"), tmp_path / "files"
    flags = (*FLAGS, "--hicache-mem-layout", "page_first_direct")
    folder = {"SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(files)}

    def serve(*more: str, kind: str, loses: bool = False) -> list[list[Answer]]:
        argv = command_line(model, RANKS, *flags, *more)
        return ready.ranks(asked, RANKS, argv, files, kind, loses, **folder)

    for of_rank in serve(kind="name-float32-page_first_direct", loses=True):
        assert [got.cached_tokens for got in of_rank] == [0, 4 * WIDE, 2 * WIDE]
        for got in of_rank:
            check(model, PROMPT, got, NEW_TOKENS)
    for of_rank in serve(*others, kind=kind):
        assert [got.cached_tokens for got in of_rank] == [0, 4 * WIDE]
