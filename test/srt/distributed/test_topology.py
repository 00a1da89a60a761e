"""The layout's arithmetic, against the definition of attention head by head."""

import re
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
from sglang_helix.srt.distributed.topology import (
    Layout,
    LayoutError,
    divisors,
    layout_of,
    legal_layouts,
)

pytestmark = pytest.mark.quick

SIZES = range(1, 17)
LAYOUTS = [Layout(tp, kvp) for tp in SIZES for kvp in divisors(tp)]


@pytest.mark.parametrize("tp_size", SIZES)
@pytest.mark.parametrize("kvp_size", range(-1, 18))
def test_sizes_that_do_not_divide_are_refused(tp_size: int, kvp_size: int) -> None:
    if kvp_size > 0 and tp_size % kvp_size == 0:
        assert Layout(tp_size, kvp_size).attn_tp_size * kvp_size == tp_size
        return
    with pytest.raises(LayoutError) as error:
        Layout(tp_size, kvp_size)
    assert f"--dcp-size {kvp_size} does not divide --tp-size {tp_size}" in str(error.value)
    assert f"use one of {divisors(tp_size)}" in str(error.value)


@pytest.mark.parametrize("replicas", [1, 2])
def test_groups_partition_the_world(replicas: int) -> None:
    for layout in LAYOUTS:
        world = list(range(replicas * layout.tp_size))
        kvp, attn_tp = layout.kvp_groups(len(world)), layout.attn_tp_groups(len(world))
        assert sorted(chain(*kvp)) == sorted(chain(*attn_tp)) == world
        assert all(len(group) == layout.kvp_size for group in kvp)
        assert all(len(group) == layout.attn_tp_size for group in attn_tp)
        for group in kvp:
            assert group == list(range(group[0], group[0] + layout.kvp_size))
            inside = [rank % layout.tp_size for rank in group]
            assert len({rank // layout.tp_size for rank in group}) == 1
            assert {layout.attn_shard(rank) for rank in inside} == {layout.attn_shard(inside[0])}
            assert [layout.kvp_rank(rank) for rank in inside] == list(range(layout.kvp_size))
        for group in attn_tp:
            inside = [rank % layout.tp_size for rank in group]
            assert len({rank // layout.tp_size for rank in group}) == 1
            assert len({layout.kvp_rank(rank) for rank in inside}) == 1
            assert [layout.attn_shard(rank) for rank in inside] == list(range(len(inside)))


def test_after_the_exchange_a_rank_has_the_slice_of_plain_tp() -> None:
    for layout in LAYOUTS:
        heads = 3 * layout.tp_size
        shard_heads, own = heads // layout.attn_tp_size, heads // layout.tp_size
        for rank in range(layout.tp_size):
            first = layout.attn_shard(rank) * shard_heads + layout.kvp_rank(rank) * own
            assert first == rank * own


def held(layout: Layout, shard: int, kv_heads: int) -> set[int]:
    """Key-value heads of a shard: a run of them, or one that it shares with other shards."""
    count = layout.kv_heads(kv_heads)
    first = shard * kv_heads // layout.attn_tp_size
    return set(range(first, first + count))


def can_be_right(layout: Layout, query_heads: int, kv_heads: int) -> bool:
    """Whether every rank ends with whole heads, and every shard holds just what it attends."""
    if query_heads % layout.tp_size:
        return False
    group, shard_heads = query_heads // kv_heads, query_heads // layout.attn_tp_size
    return all(
        {head // group for head in range(shard * shard_heads, (shard + 1) * shard_heads)}
        == held(layout, shard, kv_heads)
        for shard in range(layout.attn_tp_size)
    )


@pytest.mark.parametrize("query_heads", [1, 2, 4, 6, 8, 12, 16, 24, 32, 48])
def test_heads_are_accepted_where_they_can_be_right_and_only_there(query_heads: int) -> None:
    for kv_heads in divisors(query_heads):
        for layout in LAYOUTS:
            try:
                layout.check_heads(query_heads, kv_heads)
                accepted = True
            except LayoutError:
                accepted = False
            built = layout.tp_size % kv_heads == 0 or kv_heads % layout.tp_size == 0
            assert accepted == (built and can_be_right(layout, query_heads, kv_heads)), (
                f"{layout}, {query_heads} query and {kv_heads} key-value heads"
            )


ASSERTIONS = re.compile(
    r"if (self\.total_num_kv_heads >= \S+):(?:\s*#.*)*\s*assert (.+)"
    r"\s*else:(?:\s*#.*)*\s*assert (.+)"
)


def assertions_of_attention_classes() -> list[str]:
    """What each of SGLang's models asserts of N and its key-value heads, as code over both."""
    spec = find_spec("sglang")
    assert spec is not None
    assert spec.submodule_search_locations
    return [
        re.sub(r"(self\.)?\w*(tp_size|tp_world_size)\b", "N", f"({many}) if ({test}) else ({few})")
        for path in Path(spec.submodule_search_locations[0], "srt/models").rglob("*.py")
        for test, many, few in ASSERTIONS.findall(path.read_text())
    ]


def test_what_sglangs_classes_cannot_build_is_neither_accepted_nor_advised() -> None:
    rules = assertions_of_attention_classes()
    assert len(rules) > 60
    (rule,) = set(rules)
    code = compile(rule, "assertions", "eval")
    for tp_size in SIZES:
        for kv_heads in SIZES:
            built = eval(code, {"N": tp_size, "self": SimpleNamespace(total_num_kv_heads=kv_heads)})
            for query_heads in SIZES:
                legal = legal_layouts(tp_size, query_heads, kv_heads)
                assert built or not legal, (tp_size, query_heads, kv_heads)
                for layout in legal:
                    layout.check_heads(query_heads, kv_heads)


def test_phi_4_is_told_to_change_the_number_of_ranks() -> None:
    for kvp_size in divisors(8):
        with pytest.raises(LayoutError, match=r"10 key-value heads and 8 ranks.*change --tp"):
            Layout(8, kvp_size).check_heads(40, 10)
    assert [layout.kvp_size for layout in legal_layouts(10, 40, 10)] == [1, 2, 5, 10]


def test_legal_layouts_are_those_that_pass() -> None:
    assert [layout.kvp_size for layout in legal_layouts(8, 8, 8)] == [1, 2, 4, 8]
    assert [layout.kvp_size for layout in legal_layouts(6, 12, 2)] == [1, 3, 6]
    assert legal_layouts(3, 8, 2) == []


@pytest.mark.parametrize(
    ("tp_size", "kvp_size", "heads", "kv_heads", "named"),
    [
        (6, 2, 12, 2, ["2 key-value heads", "3 attention shards", "use one of [1, 3, 6]"]),
        (12, 2, 24, 4, ["4 key-value heads", "6 attention shards", "use one of [1, 3, 6, 12]"]),
        (3, 3, 8, 2, ["8 query heads", "3 ranks", "change --tp-size"]),
    ],
)
def test_errors_name_what_works(
    tp_size: int, kvp_size: int, heads: int, kv_heads: int, named: list[str]
) -> None:
    with pytest.raises(LayoutError) as error:
        Layout(tp_size, kvp_size).check_heads(heads, kv_heads)
    message = str(error.value)
    assert message.startswith(f"--dcp-size {kvp_size} with --tp-size {tp_size}: ")
    assert all(part in message for part in named), message
    for size in re.findall(r"\d+", message.partition("use one of ")[2]):
        Layout(tp_size, int(size)).check_heads(heads, kv_heads)


def test_errors_speak_of_the_flag_that_was_given() -> None:
    with pytest.raises(
        LayoutError, match=r"^--attn-tp-size 3 with --tp-size 6.*one of \[1, 2, 6\]"
    ):
        Layout(6, 2).check_heads(12, 2, decoupled=True)


def test_layout_of_attention_tp_size() -> None:
    assert layout_of(8, 2, 1) == layout_of(8, 2, 4) == Layout(8, 4)
    with pytest.raises(LayoutError, match=r"--attn-tp-size 3 does not divide --tp-size 8"):
        layout_of(8, 3, 1)
    with pytest.raises(LayoutError, match=r"means --dcp-size 4, but --dcp-size 2 was given"):
        layout_of(8, 2, 2)


def test_capacity_is_what_is_not_stored_twice() -> None:
    """Tokens beside plain TP: key-value heads a rank stores of each token, averaged over ranks."""
    for layout in LAYOUTS:
        assert layout.capacity_ratio(None) == layout.kvp_size
        for kv_heads in (1, 2, 4, 8, 16):
            plain = max(1, kv_heads // layout.tp_size)
            sharded = max(1, kv_heads // layout.attn_tp_size) / layout.kvp_size
            assert layout.capacity_ratio(kv_heads) == pytest.approx(plain / sharded)
