"""The attention backends that serve a sharded cache: one record each.

From this table follow which backends may be named for GQA and for MLA and which one is taken where
none is, the base of every LSE, the factories and the list of absorbed backends that the series
registers with SGLang, the sentence in README and docs/attention-backends.md. What was seen of each
on a GPU: `seen.py`. To add an adapter: CONTRIBUTING.md, 1.

Importing this module imports neither SGLang nor torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sglang_helix.srt.layers.attention.seen import seen_on_gpus

Attention = Literal["GQA", "MLA"]  # GQA stands for MHA too
Form = Literal["rows", "splits", "masked rows"]

# The series' own modules; classes of all others are SGLang's.
_FLASHATTENTION = "sglang_helix.srt.layers.attention.flashattention_backend"
_FLASHINFER = "sglang_helix.srt.layers.attention.flashinfer_backend"
_FLASHINFER_MLA = "sglang_helix.srt.layers.attention.flashinfer_mla_backend"
_FLASHMLA = "sglang_helix.srt.layers.attention.flashmla_backend"
_TRTLLM_MHA = "sglang_helix.srt.layers.attention.trtllm_mha_backend"
_TRITON = "sglang_helix.srt.layers.attention.triton_backend"
_TORCH_NATIVE = "sglang_helix.srt.layers.attention.torch_native_backend"
_SGLANG = "sglang.srt.layers.attention"

_CONVERTED = "decode would convert the whole pool in every layer; not tried as prefill alone"


class _SGLangs(str):
    """module:class of SGLang itself, which serves a sharded cache as it stands."""


@dataclass(frozen=True)
class Adapter:
    """One of SGLang's attention backends, and what of it serves a sharded cache.

    name: as `--attention-backend` has it.
    base2: whether its kernels return LSEs to the base of 2; else natural ones. The one fact whose
        error is silent: every consumer of an LSE asks this field.
    gqa, mla: "module:Class" of what serves GQA and MHA, and MLA; the first one is built, where it
        is the series' own. Classes of SGLang are complete upstream, but for drafts where one of the
        series' stands behind them. Empty: it does not serve.
    majors: of the compute capabilities that its kernels are built for, each with kernels of its
        own: what was seen on one says nothing of another. None: any CUDA device, by the same ones.
        mla_majors: where MLA asks for others.
    no_fp8: what keeps an attention from reading an fp8 cache; nothing where it reads one.
    no_drafts: what keeps an attention from verifying drafts; nothing where it verifies them.
    no_e5m2: whether an fp8 cache may be e4m3 alone.
    drafts_in_graphs: attention whose verify passes it captures.
    leaves: the form of its decode's partial results, see `dcp/partial.py`: Partial, Splits, Masked.
    pages: the page sizes it takes; None: any.
    off_cuda: whether it runs where there is no CUDA device, too.
    windows: whether it serves models that have layers of a sliding window.
    why, upstream, until: the catalogue entry of the hook that puts the adapter in the place of
        upstream's backend, see `Hook`.
    """

    name: str
    base2: bool
    gqa: tuple[str, ...] = ()
    mla: tuple[str, ...] = ()
    majors: tuple[int, ...] | None = None
    mla_majors: tuple[int, ...] | None = None
    off_cuda: bool = False
    windows: bool = False
    no_fp8: Mapping[Attention, str] = field(default_factory=dict)
    no_drafts: Mapping[Attention, str] = field(default_factory=dict)
    no_e5m2: bool = False
    drafts_in_graphs: tuple[Attention, ...] = ()
    leaves: Form = "rows"
    pages: tuple[int, ...] | None = None
    why: str = ""
    upstream: str = "none"
    until: str = ""

    def classes(self, attention: Attention) -> tuple[str, ...]:
        """What serves this attention, as "module:Class"."""
        return self.mla if attention == "MLA" else self.gqa

    def own_class(self, attention: Attention, *, drafts: bool = False) -> str | None:
        """The class of the series that serves it; None where SGLang's own does, or nothing.

        drafts: whether the server verifies any.
        """
        names = self.classes(attention)
        built = names if drafts else names[:1]
        return next((name for name in built if not isinstance(name, _SGLangs)), None)

    @property
    def own_file(self) -> str | None:
        """Where the series' classes are, under `srt`; None where SGLang's do everything."""
        own = self.own_class("GQA") or self.own_class("MLA")
        return own and own.partition(":")[0].partition(".srt.")[2].replace(".", "/") + ".py"

    def majors_for(self, attention: Attention) -> tuple[int, ...] | None:
        """Of the compute capabilities that it serves this attention on; None: any CUDA device."""
        return self.mla_majors if attention == "MLA" and self.mla_majors else self.majors

    def unseen(self, attention: Attention) -> tuple[int | None, ...]:
        """Majors that it is built for and has served no model on; None stands for any GPU.

        SGLang's own classes are complete upstream, and the reference's place is a CPU.
        """
        if self.off_cuda or not self.own_class(attention):
            return ()
        majors = self.majors_for(attention) or (None,)
        return tuple(
            major for major in majors if not seen_on_gpus(self.name, attention, major=major)
        )

    def is_unseen_on(self, platform: Any, attention: Attention) -> bool:
        """Whether no such GPU has been seen with it, so that it is taken by name alone.

        platform: SGLang's `get_platform()`; False where it has no CUDA device.
        """
        return platform.is_cuda and self._kernels_on(platform) in self.unseen(attention)

    def is_verified_on(self, platform: Any, attention: Attention) -> bool:
        """Whether such a GPU has verified drafts from graphs that it captured; any, on a CPU."""
        return seen_on_gpus(self.name, attention, {"verify"}, major=self._kernels_on(platform))

    def _kernels_on(self, platform: Any) -> int | None:
        """The major whose kernels it runs there, where they differ."""
        return platform.device_sm // 10 if self.majors and platform.is_cuda else None

    def refuses_fp8(self, attention: Attention, *, e5m2: bool) -> str:
        """Why it does not read a cache in fp8, e4m3 or e5m2; empty if it does."""
        return self.no_fp8.get(attention) or ("fp8_e4m3 it does" if e5m2 and self.no_e5m2 else "")

    def runs_on(self, platform: Any, attention: Attention) -> bool:
        """Whether a user may name it on a machine, SGLang's `get_platform()`.

        Where there is no CUDA device anything goes: Triton's interpreter, stand-ins for kernels.
        """
        majors = self.majors_for(attention)
        return not platform.is_cuda or majors is None or platform.device_sm // 10 in majors

    def is_chosen_on(self, platform: Any, attention: Attention) -> bool:
        """Whether it may be taken there where the user names none."""
        if not platform.is_cuda:
            return self.off_cuda
        return self.runs_on(platform, attention) and not self.is_unseen_on(platform, attention)


# In order of preference: the first that serves the model and runs on the machine is taken where
# neither the user nor SGLang names one that works.
ADAPTERS: tuple[Adapter, ...] = (
    Adapter(
        "fa3",
        base2=False,
        windows=True,
        gqa=(f"{_FLASHATTENTION}:ShardedFlashAttentionBackend",),
        mla=(f"{_FLASHATTENTION}:ShardedFlashAttentionBackend",),
        majors=(8, 9),
        mla_majors=(9,),
        no_fp8={"MLA": _CONVERTED},
        drafts_in_graphs=("GQA", "MLA"),
        why="no DCP: dies at graph capture, or answers from every rank's slots",
        upstream="sgl-project/sglang#35384, #39440",
        until="upstream's backend attends the rows of its rank and returns LSEs",
    ),
    Adapter(
        "fa4",
        base2=False,
        gqa=(f"{_FLASHATTENTION}:ShardedFlashAttention4Backend",),
        mla=(f"{_FLASHATTENTION}:ShardedFlashAttention4Backend",),
        majors=(9, 10),
        mla_majors=(10,),
        no_fp8={
            "GQA": "its prefill reads K and V of another dtype than the queries, not tried here",
            "MLA": _CONVERTED,
        },
        drafts_in_graphs=("GQA", "MLA"),
        why="no DCP: attends every rank's slots",
        until="upstream's backend attends the rows of its rank and returns LSEs",
    ),
    Adapter(
        "flashinfer",
        base2=True,
        gqa=(f"{_FLASHINFER}:ShardedFlashInferAttnBackend",),
        mla=(
            _SGLangs(f"{_SGLANG}.flashinfer_mla_backend:FlashInferMLAAttnBackend"),
            f"{_FLASHINFER_MLA}:ShardedFlashInferMLAAttnBackend",
        ),
        no_fp8={"MLA": _CONVERTED},
        drafts_in_graphs=("GQA", "MLA"),
        why="no DCP with GQA: attends every rank's slots, planned for the heads of one rank",
        until="upstream's backend attends the rows of its rank and returns LSEs",
    ),
    Adapter(
        "flashmla",
        base2=False,
        mla=(f"{_FLASHMLA}:ShardedFlashMLABackend",),
        drafts_in_graphs=("MLA",),
        majors=(9,),
        no_e5m2=True,
        pages=(64,),
        why="decodes with the heads of one rank over all ranks' slots, and no cache in fp8",
        until="upstream's backend reads the rows of its rank, with the heads of its group",
    ),
    Adapter(
        "trtllm_mha",
        base2=True,
        gqa=(f"{_TRTLLM_MHA}:ShardedTRTLLMHAAttnBackend",),
        majors=(10,),
        leaves="masked rows",
        pages=(16, 32, 64),
        why="no DCP: attends every rank's slots, and returns no LSE",
        until="upstream's backend attends the rows of its rank and returns LSEs",
    ),
    Adapter(
        "trtllm_mla",
        base2=True,
        mla=(
            _SGLangs(f"{_SGLANG}.trtllm_mla_backend:TRTLLMMLABackend"),
            _SGLangs(f"{_SGLANG}.cutedsl_mla_backend:CuteDslMLAPrefillBackend"),
        ),
        no_drafts={"MLA": "SGLang refuses it"},
        no_e5m2=True,
        majors=(10, 12),
    ),
    Adapter(
        "cutedsl_mla",
        base2=False,
        mla=(_SGLangs(f"{_SGLANG}.cutedsl_mla_backend:CuteDslMLABackend"),),
        no_drafts={"MLA": "n-grams were never tried"},
        no_e5m2=True,
        majors=(10,),
    ),
    Adapter(
        "triton",
        base2=False,
        windows=True,
        gqa=(f"{_TRITON}:ShardedTritonAttnBackend",),
        mla=(f"{_TRITON}:ShardedTritonAttnBackend",),
        leaves="splits",
        drafts_in_graphs=("GQA", "MLA"),
        why="its DCP ignores the communication backend, drops heads and breaks on MLA",
        upstream="sgl-project/sglang#25090, #34161, #30444",
        until="upstream's backend honours the exchange",
    ),
    Adapter(
        "torch_native",
        base2=False,
        windows=True,
        gqa=(f"{_TORCH_NATIVE}:ShardedTorchReferenceAttnBackend",),
        mla=(f"{_TORCH_NATIVE}:ShardedTorchReferenceAttnBackend",),
        off_cuda=True,
        why="no DCP and no absorbed MLA",
        until="upstream's backend serves both",
    ),
)


def adapter(name: str) -> Adapter:
    """The record of a backend; KeyError where nothing of it serves a sharded cache."""
    return _BY_NAME[name]


def record_of(kind: type) -> Adapter:
    """The record that names a class, or the nearest one that it is derived from."""
    names = [f"{base.__module__}:{base.__qualname__}" for base in kind.__mro__]
    return next(
        record for name in names for record in ADAPTERS if name in record.gqa or name in record.mla
    )


def serving(attention: Attention) -> tuple[Adapter, ...]:
    """What serves GQA and MHA, or MLA, in order of preference."""
    return tuple(record for record in ADAPTERS if record.classes(attention))


_BY_NAME = {record.name: record for record in ADAPTERS}
