"""Body of a process that imports SGLang from trees and calls functions there; see `exported`.

It reads [(tree, [(function's name, ranks, arguments, ...)])] as a pickle, and writes for each call
of each tree what it returned on every rank. Ranks are a number of them, or a list of what each is
called with in place of its own; a call on no rank is a module to import before the others. What all
trees import is imported once.
"""

import os
import pickle
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from srt.fresh import PRELOAD, in_forks

# The better part of what SGLang imports of others.
_OTHERS = (
    "torch._dynamo",
    "torch.distributed.tensor",
    "torch._inductor.codecache",
    "triton",
    "transformers",
    "fastapi",
    "openai",
    "scipy.sparse",
    "pandas",
    "IPython",
    "flashinfer",
    "flashinfer.activation",
    "torchvision",
    "compressed_tensors",
    "aiohttp",
    "networkx",
    "timm",
    "torchaudio",
    "torch._inductor.compile_fx",
    "transformers.modeling_utils",
    "xgrammar",
    "gguf",
    "uvicorn",
)


def in_tree(tree: Path, calls: list[tuple[Any, ...]]) -> list[list[Any]]:
    """What each call returned on its ranks, SGLang being a tree's; each in forks of one process."""
    sys.path.insert(0, str(tree))
    for name in PRELOAD:
        import_module(name)
    assert sys.modules["sglang"].__file__ == str(tree / "sglang" / "__init__.py")
    answers = []
    for name, ranks, *arguments in calls:
        module, _, function = name.partition(":")
        if not ranks:  # in the process itself, for all calls after it
            answers.append(import_module(module) and [])
            continue
        call = getattr(import_module(module), function)
        own = [(rank,) for rank in range(ranks)] if isinstance(ranks, int) else ranks
        answers.append(in_forks([(call, *first, *arguments) for first in own], {}, 240))
    return answers


def main() -> None:
    trees = pickle.load(sys.stdin.buffer)
    writer = os.dup(1)
    os.dup2(2, 1)  # what is printed below is no answer
    for name in _OTHERS:
        import_module(name)
    answers = []
    for tree, calls in trees:
        ((status, answer, output),) = in_forks([(in_tree, tree, calls)], {}, 600)
        assert status == 0, output
        answers.append(answer)
    with open(writer, "wb") as stream:
        stream.write(pickle.dumps(answers))


if __name__ == "__main__":
    main()
