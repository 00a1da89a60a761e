"""What the text of each of SGLang's attention classes says of it: a verdict by its projections."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

WORKS = "works"
MLA = "MLA of DeepSeek's class"
# These work where the configuration asks for no window, no chunks, and a causal decoder.
BY_CONFIGURATION = "a window, chunks or another mask, where the configuration asks for it"
CROSS = "cross attention"
NO_QKV = "no QKVParallelLinear"
SEVERAL_LAYERS = "several attention layers in one class"
GATE = "a projection beside q, k, v and o, where the configuration asks for it"
GATE_IN_QKV = "a gate in the query projection"
WEIGHTS = "weights beside the projections"
NORM = "a query or key norm over several heads"
NO_HEADS = "no num_heads, num_kv_heads, q_size and kv_size to set"
OUTPUT = "something between attention and the output projection"
INDEXER = "an indexer of the keys that it sees"
OWN_WRITE = "a write to the cache that passes by the adapter"
LINEAR = "a linear attention's state, which no adapter sees"
# Nanbeige refuses such ranks; OLMo's norms over all key heads fail on their weights or their input.
SHARES_NO_HEADS = "no plain TP on more ranks than key-value heads, so that A is never as many"
ALL_HEADS = "as many key-value heads as query heads, so that A is never as many"


def scan() -> tuple[dict[str, str], dict[str, str]]:
    """By module and name, the verdict of every class fitted, and of those that cannot be, built."""
    spec = find_spec("sglang")
    assert spec is not None
    assert spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0], "srt/models")
    classes = {
        f"{path.relative_to(root).with_suffix('').as_posix()}.{node.name}": node
        for path in sorted(root.rglob("*.py"))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef)
    }
    attention = {
        name: node
        for name, node in classes.items()
        if any(called(call) == "RadixAttention" for call in calls(node))
    }
    verdicts = {name: verdict(node) for name, node in attention.items()}
    built = {
        name: verdict_as_built(attention[name])
        for name, fitted in verdicts.items()
        if fitted not in (WORKS, BY_CONFIGURATION, MLA)
    }
    heirs: dict[str, str] = verdicts
    while heirs:
        known = {name.rpartition(".")[2] for name in heirs}
        heirs = {
            name: f"inherits from {base}"
            for name, node in classes.items()
            for base in map(last_name, node.bases)
            if base in known and name not in verdicts
        }
        verdicts |= heirs
    return verdicts, built


def verdict(attention: ast.ClassDef) -> str:
    """Why the loader cannot fit the class, or in which case it can; see the constants."""
    if attention.name == "DeepseekV2AttentionMLA":
        return MLA
    members, made = members_of(attention)
    named = {"QKVParallelLinear", "RowParallelLinear", "RadixAttention"}
    projections, outputs, layers = (
        makers_of(made, maker)
        for maker in ("QKVParallelLinear", "RowParallelLinear", "RadixAttention")
    )
    options = options_of(attention)
    rules: list[tuple[str, Any]] = [
        (CROSS, "is_cross_attention" in options),
        (NO_QKV, not projections),
        (SEVERAL_LAYERS, len(layers) != 1),
        (GATE, any(maker.endswith("Linear") for m in made.values() for maker in m - named)),
        (
            GATE_IN_QKV,
            any("gate" in ast.unparse(v) for name in projections for v in members[name]),
        ),
        (WEIGHTS, any(called(c) in ("Parameter", "register_buffer") for c in calls(attention))),
        (WEIGHTS, "alibi_slopes" in members),
        (NORM, any(is_wide_norm(n, value) for n, values in members.items() for value in values)),
        (NO_HEADS, not {"num_heads", "num_kv_heads", "q_size", "kv_size"} <= set(members)),
        (OUTPUT, any(changes_output(m, layers, outputs) for m in attention.body)),
        (BY_CONFIGURATION, options & {"sliding_window_size", "attn_type", "use_irope"}),
    ]
    return next((reason for reason, applies in rules if applies), WORKS)


def verdict_as_built(attention: ast.ClassDef) -> str:
    """Why the loader refuses the class where A >= KV, or in which case it does not."""
    members, made = members_of(attention)
    options = options_of(attention)
    # One for each head, which the exchange counts.
    sinks = {
        call
        for name in ("sinks", "attention_sink_bias")
        for value in members[name]
        for call in ast.walk(value)
    }
    tensors = [
        ast.unparse(call)
        for call in calls(attention)
        if called(call) in ("Parameter", "register_buffer") and call not in sinks
    ]
    whole = [
        call
        for call in calls(attention)
        if called(call) == "QKVParallelLinear" and not has_kv_heads(call)
    ]
    rules: list[tuple[str, Any]] = [
        (CROSS, "is_cross_attention" in options),
        (NO_QKV, not makers_of(made, "QKVParallelLinear")),
        (LINEAR, "Lightning" in attention.name or "LinearAttention" in attention.name),
        (WEIGHTS, [tensor for tensor in tensors if "mup_vector" not in tensor]),
        (WEIGHTS, "alibi_slopes" in members),
        (INDEXER, any(name.startswith("index") for name in members)),
        (OWN_WRITE, any(called(call) == "get_token_to_kv_pool" for call in calls(attention))),
        (ALL_HEADS, whole),
        (
            SHARES_NO_HEADS,
            attention.name in ("NanbeigeAttention", "Olmo2Attention", "OlmoeAttention"),
        ),
        (BY_CONFIGURATION, options & {"sliding_window_size", "attn_type", "use_irope"}),
    ]
    return next((reason for reason, applies in rules if applies), WORKS)


def members_of(
    attention: ast.ClassDef,
) -> tuple[dict[str, list[ast.expr]], dict[str, set[str]]]:
    """What a class assigns to each member, and what it calls for that."""
    members: defaultdict[str, list[ast.expr]] = defaultdict(list)
    for node in ast.walk(attention):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                members[member(target)].append(node.value)
    return members, {name: {called(v) for v in values} for name, values in members.items()}


def makers_of(made: dict[str, set[str]], maker: str) -> set[str]:
    return {name for name, makers in made.items() if name and maker in makers}


def options_of(attention: ast.ClassDef) -> set[str | None]:
    return {
        keyword.arg
        for call in calls(attention)
        if called(call) == "RadixAttention"
        for keyword in call.keywords
    }


def has_kv_heads(projection: ast.Call) -> bool:
    """Whether a QKVParallelLinear is given a number of key-value heads of its own."""
    named = {keyword.arg for keyword in projection.keywords}
    return len(projection.args) > 3 or "total_num_kv_heads" in named


def is_wide_norm(name: str, value: ast.expr) -> bool:
    """Whether a query or key norm is made for another width than one head's."""
    if "Norm" not in called(value) or not name.startswith(("q_", "k_", "query_", "key_")):
        return False
    assert isinstance(value, ast.Call)
    width = [*value.args, *(keyword.value for keyword in value.keywords)][0]
    return last_name(width) != "head_dim"


def changes_output(method: ast.stmt, layers: set[str], outputs: set[str]) -> bool:
    """Whether a method does more with an attention layer's output than to project it."""
    results = {
        target.id
        for node in ast.walk(method)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and member(node.value.func) in layers
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    projected = {id(arg) for c in calls(method) if member(c.func) in outputs for arg in c.args}
    returned = {id(node.value) for node in ast.walk(method) if isinstance(node, ast.Return)}
    return any(
        node.id in results and id(node) not in projected | returned
        for node in ast.walk(method)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    )


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def called(node: ast.expr) -> str:
    """Last name of what an expression calls; empty where it is no call."""
    return last_name(node.func) if isinstance(node, ast.Call) else ""


def last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def member(node: ast.expr) -> str:
    """The name in ``self.name``; empty for anything else."""
    if isinstance(node, ast.Attribute) and last_name(node.value) == "self":
        return node.attr
    return ""


def by_name(verdicts: dict[str, str]) -> dict[str, str]:
    return {name: reason for reason, names in verdicts.items() for name in names.split()}
