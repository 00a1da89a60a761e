"""Drafts of speculative decoding that a verify pass attends: which of them see which, and as what.

All of a request's drafts see all of its cached tokens, so to a kernel of decode they can be more
heads of their request (`fold`), and to an exchange too: it then carries what is cheap to reduce on
the way.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.attention.verify_mask import VerifyMask
from sglang.srt.speculative.eagle_utils import TreeMaskMode
from sglang.srt.speculative.spec_info import SpecInputType
from torch import Tensor

from sglang_helix.srt.layers.dcp.lse_combine import combine_splits
from sglang_helix.srt.layers.dcp.partial import Partial, Splits

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class Drafts(AttentionBackend):
    """Of an attention backend, what it knows of the drafts of a verify pass."""

    device: str
    base2: bool
    # Drafts of each request, and which of them each one sees, bool [B * drafts, drafts]. Captured
    # ones are written by SGLang itself.
    drafts = 0
    visible: Tensor
    captured_width = 1  # queries of a request in captured graphs: 1, or the drafts of a verify pass
    _verify_mask: VerifyMask | None = None

    @property
    def verify_mask(self) -> VerifyMask | None:
        """Where SGLang writes which drafts see which; None before graphs are captured.

        Without columns for cached tokens, which every draft sees.
        """
        return self._verify_mask

    def prepare_drafts(self, forward_batch: ForwardBatch) -> None:
        """Which drafts see which, in an eager pass that verifies some."""
        if forward_batch.forward_mode.is_target_verify():
            self.drafts = forward_batch.spec_info.draft_token_num
            self.visible = self._visible(forward_batch.spec_info, forward_batch.seq_lens)

    def allocate_captured_drafts(self, max_bs: int, max_num_tokens: int) -> None:
        """Which drafts see which, for captured verify passes."""
        self.captured_width = width = max_num_tokens // max_bs
        if width > 1:
            mask = torch.ones(max_num_tokens * width, dtype=torch.bool, device=self.device)
            self._verify_mask = VerifyMask(mask, TreeMaskMode.QLEN_ONLY, max_bs)

    def prepare_captured_drafts(self, forward_batch: ForwardBatch, in_capture: bool) -> None:
        """Which drafts see which, in the capture or one replay of a verify pass, in place.

        A replay brings the mask of its real requests only.
        """
        if self._verify_mask is None or not forward_batch.forward_mode.is_target_verify():
            return  # or an eager pass, as above
        width = self.captured_width
        captured = self._verify_mask.buffer.view(-1, width)
        if in_capture:
            self.drafts, self.visible = width, captured[: forward_batch.batch_size * width]
            return
        tokens = len(forward_batch.out_cache_loc)
        seen = self._visible(forward_batch.spec_info, forward_batch.seq_lens[: tokens // width])
        captured[:tokens].copy_(seen)

    def _visible(self, drafted: Any, cached: Tensor) -> Tensor:
        """bool [B * drafts, drafts] of requests with so many cached tokens [B]."""
        drafts = drafted.draft_token_num
        mask: Tensor = drafted.custom_mask
        if self._verify_mask is not None and drafted.spec_input_type == SpecInputType.EAGLE_VERIFY:
            return mask[: len(cached) * drafts**2].view(-1, drafts)
        return visible_drafts(mask, cached, drafts)

    def attend_drafts(
        self, q: Tensor | tuple[Tensor, Tensor], k: Tensor, v: Tensor, layer: RadixAttention
    ) -> Partial:
        """The drafts on themselves, for backends whose kernels have no masks, in plain torch.

        q [T, h, Dk] or MLA's two parts of it, k [T, g, Dk], v [T, g, Dv] -> out fp32 [T, h, Dv],
        LSE [T, h]. A few small products: T * h * drafts logits.
        """
        if isinstance(q, tuple):
            q = torch.cat(q, -1)
        drafts, groups = self.drafts, k.shape[1]
        queries = fold(q, drafts, groups).unflatten(1, (groups, -1)).float()
        keys, values = (part.unflatten(0, (-1, drafts)).transpose(1, 2).float() for part in (k, v))
        logits = queries @ keys.mT * layer.scaling
        if layer.logit_cap > 0:
            logits = layer.logit_cap * torch.tanh(logits / layer.logit_cap)
        seen = self.visible.view(-1, 1, drafts, 1, drafts)
        logits = logits.unflatten(2, (drafts, -1)).masked_fill(~seen, -torch.inf).flatten(2, 3)
        lse = logits.logsumexp(-1)  # finite: each draft sees itself
        out = torch.exp(logits - lse[..., None]) @ values
        if self.base2:
            lse = lse / math.log(2)
        return unfolded(Partial(out.flatten(1, 2), lse.flatten(1, 2)), drafts, groups)


class Drafted(NamedTuple):
    """Drafts of B requests over cached tokens, as more heads of their requests."""

    partial: Partial | Splits
    """Of drafts * H heads, as `fold` orders them."""
    drafts: int
    chunks: int
    """Runs of heads that stay together, of all H."""

    def merged(self, dtype: torch.dtype) -> Partial:
        """Of each draft: out [B * drafts, H, D], and lse; splits are merged into dtype."""
        partial = self.partial
        if isinstance(partial, Splits):
            partial = combine_splits(partial, dtype)
        return unfolded(partial, self.drafts, self.chunks)


def fold(q: Tensor, drafts: int, chunks: int) -> Tensor:
    """[B * drafts, H, ...] -> [B, drafts * H, ...]: drafts of a request as more heads of one query.

    chunks: runs of heads that stay together, behind each other for all drafts. Where none crosses
    from one key-value head's query heads to the next's, each still reads its own; where none
    crosses from one rank's to the next's, each rank's still are a run.
    """
    chunked = q.unflatten(1, (chunks, -1)).unflatten(0, (-1, drafts))
    return chunked.transpose(1, 2).flatten(1, 3)


def unfold(out: Tensor, drafts: int, chunks: int) -> Tensor:
    """The opposite of `fold`."""
    return out.unflatten(1, (chunks, drafts, -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1)


def unfolded(partial: Partial, drafts: int, chunks: int) -> Partial:
    """`unfold`, of outputs and LSEs."""
    return Partial(*(unfold(part, drafts, chunks) for part in partial))


def visible_drafts(mask: Tensor, cached: Tensor, drafts: int) -> Tensor:
    """[B * drafts, drafts] bool: which drafts of its request each draft sees.

    SGLang's mask has a row for each draft, over the cached tokens [B] and then the drafts.
    """
    columns = cached + drafts
    before = drafts * (columns.cumsum(0) - columns)
    own = torch.arange(drafts, device=columns.device)
    first = before[:, None] + own * columns[:, None] + cached[:, None]
    cells = (first[..., None] + own).view(-1, drafts)
    return mask[cells]
