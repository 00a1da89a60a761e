"""``python -m sglang_helix check``: the verdict of models and flags, before anything is loaded.

SGLang resolves the arguments as for a launch, on this machine or on one that it is only told about,
which reads the model's config.json and no weights. Where the series serves, the loader's checks of
the model's layers follow, in a process of their own (build.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from sglang_helix.build import Builder, first_line, has_gpu, in_a_fork

# Flags that ask for a layout; without one, all are tried.
LAYOUT_FLAGS = {
    *("--dcp-size", "--decode-context-parallel-size"),
    *("--attn-tp-size", "--attention-tensor-parallel-size"),
}
ENDED = "the process that resolved its arguments ended"
# What SGLang believes about a machine with such GPUs.
MACHINES: dict[str, dict[str, Any]] = {
    "Ampere": {"device_sm": 80},
    "Hopper": {"device_sm": 90, "is_sm90": True, "is_hopper_with_cuda_12_3": True},
    "Blackwell": {
        "device_sm": 100,
        "is_sm100": True,
        "is_sm100_or_sm110": True,
        "is_blackwell": True,
    },
}
#: No GPU: SGLang's `--device cpu`, or the CPU reference platform.
CPU = "Cpu"


def facts_of(machine: str) -> dict[str, Any]:
    """Facts for SGLang's `override_platform`."""
    if machine == CPU:
        none = {"device_sm": 0, "device_capability": (None, None)}
        return {"is_cuda": False, "has_flashinfer": False, **none}
    facts = MACHINES[machine]
    major = facts["device_sm"] // 10
    return {"is_cuda": True, "has_flashinfer": True, "device_capability": (major, 0), **facts}


@contextmanager
def told_about(machine: str) -> Iterator[None]:
    """Within it SGLang believes to run on such a machine."""
    from unittest import mock

    from sglang.srt.layers.quantization import QUANTIZATION_METHODS, Mxfp4Config
    from sglang.srt.runtime_context import override_platform

    facts = facts_of(machine)
    capability = mock.patch(
        "torch.cuda.get_device_capability", return_value=facts["device_capability"]
    )
    # A table that SGLang fills by the machine as it is imported.
    quantization = mock.patch.dict(QUANTIZATION_METHODS, mxfp4=Mxfp4Config)
    # Some steps set variables for the ranks to come.
    with mock.patch.dict(os.environ), override_platform(**facts), capability, quantization:
        yield


def _on(machine: str) -> list[str]:
    """Flags of a server on a machine that SGLang is told about."""
    return ["--device", "cpu" if machine == CPU else "cuda"]


def configuration_of(
    model_path: str, machine: str | None = None, argv: Sequence[str] | None = None
) -> Any:
    """SGLang's ModelConfig, as on a machine with GPUs: Hopper's where none is named.

    argv: flags of a server, some of which say how it is read; None: by SGLang's own defaults.
    Raises OSError or ValueError where it cannot be read.
    """
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.server_args import prepare_server_args

    machine = machine or "Hopper"
    with told_about(machine):
        if argv is None:
            return ModelConfig(model_path)
        given = ["--model-path", model_path, *argv, *_on(machine)]
        return ModelConfig.from_server_args(prepare_server_args(given))


class Answer(NamedTuple):
    """What becomes of one server.

    verdict: "works", "own", "refused", or "whole" where no sharded cache is asked for.
    meaning: a sentence or more.
    attention: the backend that would be chosen, where the series serves.
    built: whether the loader has seen the model's layers.
    """

    verdict: str
    meaning: str
    attention: str = ""
    built: bool = True


def check(argv: Sequence[str], builder: Builder, machine: str | None = None) -> Answer:
    """The verdict of a server's command line, and what it means.

    machine: one of MACHINES, or CPU; None for this one, which then needs an accelerator or a
    platform.
    """
    from sglang.srt.plugins import load_plugins

    load_plugins()
    said = in_a_fork(_answer, list(argv), machine)
    if said is None:
        return Answer("refused", ENDED)
    told, model, sharded = said
    answer = Answer(*told)
    if answer.verdict != "works":
        return answer
    refused, problem = builder.build([*model, *sharded])
    if refused:
        return Answer("refused", refused)
    if problem:
        unseen = f"Its layers could not be built here and are checked when it starts ({problem})."
        if builder.build(model)[1] == problem:
            unseen += " SGLang builds them here no more without a sharded cache."
        return answer._replace(meaning=f"{answer.meaning} {unseen}", built=False)
    return answer._replace(meaning=f"{answer.meaning} Its layers are as the series needs them.")


def layouts(config: Any, tp_size: int, replicas: int = 1) -> list[tuple[list[str], float]]:
    """The flags of every sharded layout that the heads of a model allow, and its gain in tokens.

    config: SGLang's ModelConfig. replicas: of attention (`--attn-dp-size`), which share the ranks.

    Raises LayoutError where those do not divide the ranks.
    """
    from sglang_helix.layout import shape_of
    from sglang_helix.srt.configs.model_config import state_heads
    from sglang_helix.srt.distributed.topology import legal_layouts, ranks_of_replica

    ranks = ranks_of_replica(tp_size, replicas)
    if any(heads % ranks for heads in state_heads(config)):
        return []
    shape, found = shape_of(config), []
    for layout in legal_layouts(ranks, shape.query_heads, shape.kv_heads or 1):
        if layout.kvp_size > 1:
            gain = layout.capacity_ratio(shape.kv_heads)
            found.append((["--dcp-size", str(layout.kvp_size)], gain))
            found.append((["--attn-tp-size", str(layout.attn_tp_size)], gain))
    return found


def check_layouts(
    model_path: str,
    tp_sizes: Sequence[int],
    argv: Sequence[str],
    builder: Builder,
    machine: str | None = None,
) -> Answer:
    """The verdict of a model over all its layouts on N ranks: one that works is enough.

    tp_sizes: every N to try; where they are several, a layout is named with its own.
    """
    from sglang.srt.plugins import load_plugins

    load_plugins()
    read = in_a_fork(_listed, model_path, list(tp_sizes), list(argv), machine)
    if read is None:
        return Answer("refused", ENDED)
    listed, none = read
    if none:
        return Answer("refused", none)
    # Layouts and the first one's reason. It may name sizes: one of each kind is enough.
    said: dict[tuple[str, str, str], tuple[list[str], str]] = {}
    for tp_size, layout, gain in listed:
        ranks = ["--tp-size", str(tp_size)]
        answer = check(["--model-path", model_path, *ranks, *argv, *layout], builder, machine)
        reason = "" if answer.verdict == "works" and answer.built else first_line(answer.meaning)
        kind = (answer.verdict, answer.attention, re.sub(r"\d+", "", reason))
        named = [*ranks, *layout] if len(tp_sizes) > 1 else layout
        said.setdefault(kind, ([], reason))[0].append(f"{' '.join(named)} ({gain:g}x)")
    parts, verdicts = [], {verdict for verdict, *_ in said}
    for (verdict, attention, _), (which, reason) in said.items():
        by = f" by {attention}" if attention else ""
        because = f": {reason}" if reason else ""
        parts.append(f"{', '.join(which)} {verdict}{by}{because}")
    best = next(kind for kind in ("works", "own", "refused") if kind in verdicts)
    return Answer(best, "; ".join(parts), next((by for _, by, _ in said if by), ""))


def machine_here() -> str | None:
    """Whose GPUs to answer for where no machine is named: this one's, None, or Hopper's."""
    from sglang.srt.platforms import current_platform

    return None if has_gpu() or current_platform.is_out_of_tree() else "Hopper"


def _listed(
    model_path: str, tp_sizes: Sequence[int], argv: Sequence[str], machine: str | None
) -> tuple[list[tuple[int, list[str], float]], str]:
    """Ranks, flags and gain of every layout; why there is none."""
    from sglang.srt.server_args import prepare_server_args

    from sglang_helix.srt.distributed.topology import LayoutError
    from sglang_helix.srt.server_args import attention_replicas

    replicas = attention_replicas(prepare_server_args(["--model-path", model_path, *argv]))
    try:
        config = configuration_of(model_path, machine, argv)
        listed = [(n, *one) for n in tp_sizes for one in layouts(config, n, replicas)]
    except LayoutError as indivisible:
        return [], str(indivisible)
    except (OSError, ValueError) as unreadable:
        return [], unreadable_model(model_path, unreadable)
    if listed:
        return listed, ""
    where = f"{' or '.join(map(str, tp_sizes))} ranks"
    where += f" of {replicas} attention replicas" if replicas > 1 else ""
    return [], f"its heads allow no sharded cache on {where}"


def unreadable_model(model_path: str, error: Exception) -> str:
    """What SGLang says of a model that it cannot read, and what to do where its name misleads it.

    It knows Mistral's own format by the path, and reads no config.json there.
    """
    from sglang.srt.utils.hf_transformers.mistral_utils import is_mistral_model

    if not (
        isinstance(error, FileNotFoundError)
        and is_mistral_model(model_path)
        and os.path.exists(os.path.join(model_path, "config.json"))
    ):
        return str(error)
    return (
        f"--model-path {model_path}: by its name SGLang reads this model from params.json, in "
        "Mistral's own format, and the file is not there; give --model-config-parser hf, by which "
        "SGLang reads its config.json"
    )


def _answer(argv: list[str], machine: str | None) -> tuple[Answer, list[str], list[str]]:
    """Of the arguments alone; the flags of the model to build, and those that shard its cache."""
    if machine is None:
        return _resolved(argv)
    with told_about(machine):
        return _resolved([*argv, *_on(machine)])


def _resolved(argv: Sequence[str]) -> tuple[Answer, list[str], list[str]]:
    from sglang.srt.arg_groups.overrides import attention_backends_of, resolved_view
    from sglang.srt.server_args import prepare_server_args

    from sglang_helix.srt.compatibility.verdict import announcement, verdict_of

    args = prepare_server_args(list(argv))
    try:
        args.resolve_once()
        args.check_server_args()
    except (OSError, ValueError, AssertionError, RuntimeError) as refused:
        return Answer("refused", unreadable_model(args.model_path, refused)), [], []
    verdict, view = verdict_of(args), resolved_view(args)
    if verdict.kind == "whole":
        whole = "no sharded cache is asked for: SGLang serves, as without the series"
        return Answer("whole", whole), [], []
    if verdict.kind == "own":
        return Answer("own", announcement(verdict)), [], []
    prefill, decode = attention_backends_of(view)
    backends = prefill if prefill == decode else f"{prefill} (prefill) and {decode} (decode)"
    meaning = (
        f"--tp-size {view.tp_size} --dcp-size {view.dcp_size} --dcp-comm-backend "
        f"{view.dcp_comm_backend}, attention by {backends}."
    )
    model = [
        *("--model-path", view.model_path, "--tp-size", str(view.tp_size)),
        *("--attn-dp-size", str(view.attn_dp_size)),
        *("--json-model-override-args", view.json_model_override_args),
        *("--model-config-parser", view.model_config_parser, "--model-impl", view.model_impl),
        # What is built does not depend on it, and some classes have none of the CPU's.
        *("--attention-backend", "triton"),
        *(["--trust-remote-code"] if view.trust_remote_code else []),
        *(["--disable-hybrid-swa-memory"] if view.disable_hybrid_swa_memory else []),
    ]
    sharded = [
        *("--dcp-size", str(view.dcp_size), "--dcp-comm-backend", "a2a"),
        *(["--dcp-replicate-q-proj"] if view.dcp_replicate_q_proj else []),
    ]
    return Answer("works", meaning, backends), model, sharded
