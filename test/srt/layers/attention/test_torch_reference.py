"""The torch reference against float64, and its decode and extend paths against one another."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.speculative.spec_info import SpecInputType
from sglang_helix.srt.layers.attention.torch_reference import (
    TorchReferenceAttnBackend,
    causal,
    partial_attention,
    refuse_unsupported,
)
from sglang_helix.srt.layers.dcp.lse_combine import merge
from sglang_helix.srt.layers.dcp.partial import Partial

pytestmark = pytest.mark.quick

RELATIVE_ERROR = 2e-6


def dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    logit_cap: float,
    visible: torch.Tensor,
) -> Partial:
    """The definition, in float64, one query head at a time."""
    outs, lses = [], []
    for head in range(q.shape[1]):
        kv_head = head // (q.shape[1] // k.shape[1])
        logits = q[:, head].double() @ k[:, kv_head].double().T * scale
        if logit_cap:
            logits = logit_cap * torch.tanh(logits / logit_cap)
        weights = logits.exp() * visible
        total = weights.sum(-1, keepdim=True)
        outs.append((weights / total.clamp_min(1e-300)) @ v[:, kv_head].double())
        lses.append(total.log().squeeze(-1))
    return Partial(torch.stack(outs, 1), torch.stack(lses, 1))


def assert_close(got: Partial, want: Partial, bound: float = RELATIVE_ERROR) -> None:
    assert got.out.dtype == got.lse.dtype == torch.float32
    assert (got.out - want.out).norm() <= bound * want.out.norm()
    assert torch.equal(got.lse.isneginf(), want.lse.isneginf())
    kept = ~want.lse.isneginf()
    torch.testing.assert_close(got.lse.double()[kept], want.lse[kept], rtol=1e-5, atol=1e-5)


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    queries, keys = draw(st.integers(1, 6)), draw(st.integers(0, 40))
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 8), (2, 4), (4, 1), (3, 2)]))
    k_width, v_width = draw(st.sampled_from([(16, 16), (80, 80), (192, 128), (576, 512)]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    density = draw(st.sampled_from([0.0, 0.3, 1.0]))
    return {
        "q": tensor(queries, kv_heads * group, k_width),
        "k": tensor(keys, kv_heads, k_width),
        "v": tensor(keys, kv_heads, v_width),
        "scale": k_width**-0.5 * draw(st.sampled_from([1.0, 3.0])),
        "logit_cap": draw(st.sampled_from([0.0, 2.0, 30.0])),
        "visible": torch.rand(queries, keys, generator=generator) <= density,
    }


@given(problems())
@settings(max_examples=60, deadline=None)
def test_partial_attention_against_float64(problem: dict[str, Any]) -> None:
    assert_close(partial_attention(**problem), dense(**problem))


@given(problems(), st.data())
@settings(max_examples=40, deadline=None)
def test_merging_partials_of_any_split_gives_the_whole(
    problem: dict[str, Any], data: st.DataObject
) -> None:
    owner = torch.tensor(data.draw(st.lists(st.booleans(), min_size=40, max_size=40)))
    owner = owner[: len(problem["k"])]
    halves = []
    for mine in (owner, ~owner):
        part = {**problem, "k": problem["k"][mine], "v": problem["v"][mine]}
        halves.append(partial_attention(**{**part, "visible": problem["visible"][:, mine]}))
    merged = merge(*halves, out_dtype=torch.float32, return_lse=True)
    assert_close(merged, dense(**problem))


def test_no_keys_give_zero_and_minus_infinity() -> None:
    q, k, v = torch.randn(3, 4, 8), torch.empty(0, 2, 8), torch.empty(0, 2, 6)
    nothing = partial_attention(q, k, v, scale=1.0)
    assert nothing.out.shape == (3, 4, 6)
    merged = merge(nothing, nothing, out_dtype=torch.float32, return_lse=True)
    for partial in (nothing, merged):
        assert torch.equal(partial.out, torch.zeros(3, 4, 6))
        assert torch.equal(partial.lse, torch.full((3, 4), -torch.inf))


def test_without_a_mask_every_key_is_seen() -> None:
    q, k, v = torch.randn(3, 4, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 6)
    masked = partial_attention(q, k, v, scale=1.0, visible=torch.ones(3, 5, dtype=torch.bool))
    assert all(map(torch.equal, partial_attention(q, k, v, scale=1.0), masked))


def test_causal() -> None:
    assert causal(2, 3).tolist() == [[True, True, False], [True, True, True]]
    assert causal(1, 4).all()
    assert causal(2, 4, back=1).tolist() == [
        [False, True, True, False],
        [False, False, True, True],
    ]


class Pool:
    """One layer's cache of either kind, behind the functions that SGLang's pools have."""

    def __init__(self, rows: int, k_heads: int, k_width: int, v_width: int, dtype: torch.dtype):
        # NaN wherever nothing was written: a row that is not the request's shows at once.
        self.keys = torch.full((rows, k_heads, k_width), torch.nan, dtype=dtype)
        self.mla = k_width == 576
        self.values = (
            self.keys[..., :v_width] if self.mla else torch.full_like(self.keys, torch.nan)
        )

    def get_kv_buffer(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys, self.values

    def set_kv_buffer(self, layer: Any, loc: Any, k: torch.Tensor, v: torch.Tensor) -> None:
        self.keys[loc.loc] = k.to(self.keys.dtype)
        if not self.mla:
            self.values[loc.loc] = v.to(self.values.dtype)


class Conversation:
    """Three requests on one backend: scattered rows, tokens fed in any portions."""

    LENGTHS = (37, 5, 64)

    def __init__(
        self, heads: tuple[int, int], widths: tuple[int, int], dtype: torch.dtype, back: int = -1
    ):
        generator = torch.Generator().manual_seed(0)
        total = sum(self.LENGTHS)
        (q_heads, k_heads), (k_width, v_width) = heads, widths
        self.q = torch.randn(total, q_heads, k_width, generator=generator).to(dtype)
        self.k = torch.randn(total, k_heads, k_width, generator=generator).to(dtype)
        value = torch.randn(total, k_heads, v_width, generator=generator).to(dtype)
        self.v = self.k[..., :v_width] if k_width == 576 else value
        self.layer = make_layer(q_heads, k_heads, k_width, v_width)
        self.layer.sliding_window_size = back
        # Windows and sinks, as in gpt-oss; sinks that change little and ones that decide.
        self.sinks = torch.linspace(-2, 4, q_heads) if back > -1 else None
        self.rows = torch.randperm(total + 20, generator=generator)[:total]
        table = torch.full((5, 100), -1)  # request i uses line i + 1
        for i, part in enumerate(self.rows.split(list(self.LENGTHS))):
            table[i + 1, : len(part)] = part
        self.backend = TorchReferenceAttnBackend(
            SimpleNamespace(
                req_to_token_pool=SimpleNamespace(req_to_token=table.int()),
                token_to_kv_pool=Pool(total + 20, k_heads, k_width, v_width, dtype),
            )
        )
        self.starts = [sum(self.LENGTHS[:i]) for i in range(3)]

    def feed(self, old: list[int], new: list[int], *, decode: bool = False) -> list[torch.Tensor]:
        """Run `new` more tokens of each request after `old`; outputs, a request each."""
        live = [i for i in range(3) if new[i]]
        index = torch.cat(
            [torch.arange(s + o, s + o + n) for s, o, n in zip(self.starts, old, new, strict=True)]
        )
        batch = SimpleNamespace(
            req_pool_indices=torch.tensor([i + 1 for i in live]),
            out_cache_loc=self.rows[index],
            seq_lens=torch.tensor([old[i] + new[i] for i in live]),
            forward_mode=ForwardMode.EXTEND,
            extend_seq_lens_cpu=[new[i] for i in live],
            extend_prefix_lens_cpu=[old[i] for i in live],
            spec_info=None,
        )
        forward = self.backend.forward_decode if decode else self.backend.forward_extend
        out = forward(
            self.q[index], self.k[index], self.v[index], self.layer, batch, sinks=self.sinks
        )
        assert out.dtype == self.q.dtype
        return list(out.split([n for n in new if n]))

    def expected(self, request: int) -> torch.Tensor:
        tokens = slice(self.starts[request], self.starts[request] + self.LENGTHS[request])
        length = self.LENGTHS[request]
        ages = torch.arange(length)[:, None] - torch.arange(length)
        back = self.layer.sliding_window_size
        whole = dense(
            self.q[tokens],
            self.k[tokens],
            self.v[tokens],
            self.layer.scaling,
            self.layer.logit_cap,
            (ages >= 0) & ((ages <= back) | (back == -1)),
        )
        if self.sinks is None:
            return whole.out.flatten(1)
        total = torch.logaddexp(whole.lse, self.sinks.double())
        return (whole.out * (whole.lse - total).exp()[..., None]).flatten(1)


def make_layer(q_heads: int, k_heads: int, k_width: int, v_width: int) -> SimpleNamespace:
    return SimpleNamespace(
        layer_id=0,
        tp_q_head_num=q_heads,
        tp_k_head_num=k_heads,
        tp_v_head_num=k_heads,
        qk_head_dim=k_width,
        v_head_dim=v_width,
        scaling=k_width**-0.5,
        logit_cap=20.0,
        logit_capping_method="tanh",
        is_cross_attention=False,
        attn_type=AttentionType.DECODER,
        sliding_window_size=-1,
        xai_temperature_len=-1,
    )


MODELS: dict[str, Any] = {
    "mha": ((4, 4), (16, 16)),
    "gqa": ((8, 2), (32, 32)),
    "mla": ((8, 1), (576, 512)),
    "gqa with windows and sinks": ((8, 2), (32, 32), 6),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extend_chunks_and_decode_agree_with_the_whole_sequence(
    model: str, dtype: torch.dtype
) -> None:
    heads, widths, *back = MODELS[model]
    talk = Conversation(heads, widths, dtype, *back)
    # A batch of whole prompts and first chunks; odd chunks over cached prefixes beside a prompt
    # of one token and an absent request; then decode for as long as each request has tokens.
    fed = [0, 0, 0]
    outputs: list[list[torch.Tensor]] = [[], [], []]
    steps = [([19, 0, 7], False), ([13, 1, 0], False), ([1, 1, 30], False)]
    steps += [([1, 1, 1], True)] * 3 + [([1, 0, 1], True), ([0, 0, 23], False)]
    for new, decode in steps:
        answers = iter(talk.feed(fed, new, decode=decode))
        for i in range(3):
            if new[i]:
                outputs[i].append(next(answers))
                fed[i] += new[i]
    assert tuple(fed) == talk.LENGTHS
    bound = RELATIVE_ERROR if dtype == torch.float32 else 4e-3  # the output is rounded to bf16
    for i in range(3):
        got, want = torch.cat(outputs[i]).double(), talk.expected(i)
        assert (got - want).norm() <= bound * want.norm()


def test_a_layer_without_keys_of_its_own_reads_the_cache() -> None:
    talk = Conversation(*MODELS["gqa"], torch.float32)
    filled = talk.feed([0, 0, 0], [9, 2, 4])
    index = torch.cat([torch.arange(s, s + n) for s, n in zip(talk.starts, [9, 2, 4], strict=True)])
    batch = SimpleNamespace(
        req_pool_indices=torch.tensor([1, 2, 3]),
        out_cache_loc=talk.rows[index],
        forward_mode=ForwardMode.EXTEND,
        extend_seq_lens_cpu=[9, 2, 4],
        extend_prefix_lens_cpu=[0, 0, 0],
        spec_info=None,
    )
    out = talk.backend.forward_extend(talk.q[index], None, None, talk.layer, batch)
    assert torch.equal(out, torch.cat(filled))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("is_cross_attention", True),
        ("attn_type", AttentionType.ENCODER_ONLY),
        ("attn_type", AttentionType.DECODER_BIDIRECTIONAL),
        ("xai_temperature_len", 1024),
        ("logit_capping_method", "rational"),
    ],
)
def test_what_it_would_get_wrong_is_refused(name: str, value: Any) -> None:
    layer = make_layer(4, 2, 16, 16)
    batch = SimpleNamespace(spec_info=None)
    refuse_unsupported(layer, batch)
    setattr(layer, name, value)
    with pytest.raises(NotImplementedError, match="torch_native does not support"):
        refuse_unsupported(layer, batch)


def test_other_kinds_of_drafts_are_refused() -> None:
    drafts = SimpleNamespace(spec_input_type=SpecInputType.DFLASH_VERIFY)
    with pytest.raises(NotImplementedError, match="speculative"):
        refuse_unsupported(make_layer(4, 2, 16, 16), SimpleNamespace(spec_info=drafts))
