"""What the stand-ins share: ragged attention, pages, and operators by their schemas."""

import contextlib
import functools
import importlib.util
import itertools
import mmap
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

# What tensor cores multiply, and what this platform serves checkpoints in, which stands for it.
FLOATS = (torch.float16, torch.bfloat16, torch.float32)

_libraries: dict[str, torch.library.Library] = {}


def folder_of(package: str) -> Path:
    """Directory of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed")
    return Path(spec.origin).parent


def define_operator(
    library: Path, namespace: str, name: str, function: Callable[[Any], Any]
) -> None:
    """Register ``torch.ops.<namespace>.<name>`` for CPU tensors, with the compiled one's schema.

    library: the shared object that registers the operator on a GPU; its schema is read from there,
    so that torch checks every call against it. function gets the arguments as attributes of one
    object. Raises RuntimeError where the library names no such operator.
    """
    schema = _schema(library, name)
    arguments = torch._C.parse_schema(schema).arguments
    defaults = {argument.name: argument.default_value for argument in arguments}
    names = tuple(defaults)

    @on_the_device
    def call(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False))
        return function(SimpleNamespace(**{**defaults, **given, **kwargs}))

    if namespace not in _libraries:
        _libraries[namespace] = torch.library.Library(namespace, "FRAGMENT")
    _libraries[namespace].define(schema)
    _libraries[namespace].impl(name, call, "CPU")


def _schema(library: Path, name: str) -> str:
    with library.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = content.find(f"\0{name}(".encode()) + 1
        if not start:
            raise RuntimeError(f"{library} registers no operator {name}")
        return content[start : content.find(b"\0", start)].decode()


def on_the_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """What the function does happens in a kernel: no mode of the caller watches its operations."""

    @functools.wraps(function)
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            return function(*args, **kwargs)

    return kernel


class Shadow(ModuleType):
    """A module with some of its attributes replaced, for those who are given it in its place."""

    def __init__(self, module: Any, **replaced: Any) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(replaced)
        self.__dict__["_module"] = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


def host_torch() -> Shadow:
    """``torch`` for modules that ask for pinned memory, or for "cuda", by name: host memory."""
    factories = ("empty", "zeros", "ones", "full", "arange", "tensor", "empty_like")
    return Shadow(
        torch,
        cuda=Shadow(torch.cuda, device=lambda _: contextlib.nullcontext()),
        **{name: _on_the_host(getattr(torch, name)) for name in factories},
    )


def _on_the_host(factory: Callable[..., Any]) -> Callable[..., Any]:
    def made(*args: Any, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> Any:
        return factory(*args, device="cpu" if device == "cuda" else device, **kwargs)

    return made


def demand(condition: bool, what: str) -> None:
    """What a kernel checks at its door (TORCH_CHECK): raises RuntimeError unless it holds."""
    if not condition:
        raise RuntimeError(what)


def demand_int32(**tensors: Tensor | None) -> None:
    """Indices and lengths are int32 and lie without gaps along their last dimension."""
    for name, tensor in tensors.items():
        if tensor is not None:
            demand(tensor.dtype == torch.int32, f"{name} must be int32, is {tensor.dtype}")
            demand(
                tensor.dim() == 0 or tensor.stride(-1) == 1 or tensor.shape[-1] == 1,
                f"{name} must be contiguous along its last dimension",
            )


class Request(NamedTuple):
    """One request of a ragged batch: where its queries are, and the keys they may see.

    queries: rows of q. keys [S, G, Dk], values [S, G, Dv]. causal: the last query sees every key,
    each one before it one key less; back: how many before its own, at most, -1 for all. visible:
    bool [queries, S] in its place.
    """

    queries: slice
    keys: Tensor
    values: Tensor
    causal: bool = False
    visible: Tensor | None = None
    back: int = -1


def attend(
    q: Tensor,
    requests: Iterable[Request],
    *,
    scale: float,
    logit_cap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention in fp32: out [T, H, Dv] and natural-log LSE [T, H] of q [T, H, Dk].

    sinks [H]: one more key of these logits and value 0 for each query, in the LSE as well. A query
    that sees no key gets 0 and -inf; what no request covers is NaN, as kernels leave it to the
    allocator.
    """
    # Not imported with this module: it is SGLang's, and hooks are yet to be applied.
    from sglang_helix.srt.layers.attention.torch_reference import causal, partial_attention
    from sglang_helix.srt.layers.dcp.lse_combine import merge

    requests = list(requests)
    out = q.new_full((*q.shape[:2], requests[0].values.shape[-1]), torch.nan, dtype=torch.float32)
    lse = q.new_full(q.shape[:2], torch.nan, dtype=torch.float32)
    for rows, keys, values, is_causal, visible, back in requests:
        queries = q[rows]
        partial = partial_attention(
            queries,
            keys,
            values,
            scale=scale,
            logit_cap=logit_cap,
            visible=causal(len(queries), len(keys), back) if is_causal else visible,
        )
        out[rows], lse[rows] = merge(
            partial, None, out_dtype=torch.float32, sinks=sinks, return_lse=True
        )
    return out, lse


def pages_of(cache: Tensor, table: Tensor, length: int) -> Tensor:
    """The first `length` rows that a request's page table leads to: [length, G, D].

    cache [pages, page size, G, D], table int32 [columns]. A column beyond the length is not read.
    Raises IndexError where the kernel would read beyond the table or the cache.
    """
    page_size = cache.shape[1]
    count = -(-length // page_size)
    if count > len(table):
        raise IndexError(f"{length} tokens in pages of {page_size}, table of {len(table)} columns")
    pages = table[:count].long()
    if count and not 0 <= int(pages.min()) <= int(pages.max()) < len(cache):
        raise IndexError(f"pages {pages.tolist()} of a cache of {len(cache)} pages")
    return cache[pages].flatten(0, 1)[:length]


def spans(indptr: Tensor) -> list[slice]:
    """The rows of each request, from their prefix sums [B + 1]."""
    bounds = indptr.tolist()
    if bounds[0] != 0 or bounds != sorted(bounds):
        raise IndexError(f"prefix sums must rise from 0: {bounds}")
    return [slice(first, last) for first, last in itertools.pairwise(bounds)]
