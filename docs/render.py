"""Write the pages of docs/ that are generated from code: ``python docs/render.py``.

A test compares them with what this would write, so they cannot drift.
"""

import contextlib
import io
import json
import sys
import tempfile
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import measured
from sglang.srt.configs.model_config import ModelConfig
from sglang_helix import advice, cost
from sglang_helix.__main__ import print_compatibility
from sglang_helix.build import Builder, first_line
from sglang_helix.check import check, configuration_of, layouts
from sglang_helix.layout import CACHE_BYTES, beside_a_draft, rows, shape_of, table
from sglang_helix.srt.layers.attention.adapters import ADAPTERS, Adapter, Attention, serving
from sglang_helix.srt.layers.attention.seen import (
    FEATURES,
    PARTS,
    PLACES,
    SEEN,
    Place,
    seen,
    seen_on_gpus,
)

DOCS = Path(__file__).parent
README = "../README.md"
ATTENTIONS: tuple[Attention, ...] = ("GQA", "MLA")
TP_SIZES = (8, 16)
FEW = 4
MEMORY_GIB = 60
# Models of docs/capacity.md; models.md has all of docs/models.
CAPACITY = ("DeepSeek-V3", "Kimi-K2", "Llama-3-70B", "Qwen3-235B-A22B")
# Models of docs/speculative.md, and their ranks.
DRAFTED = (("DeepSeek-V3", 16), ("Llama-3-70B", 16), ("Qwen3-235B-A22B", 8))
# Models of docs/when-it-pays.md, bytes of an element of their weights, and its name.
PAYS = (("DeepSeek-V3", 1, "fp8"), ("Qwen3-235B-A22B", 1, "fp8"), ("Llama-3-70B", 2, "bf16"))


def compatibility() -> str:
    """docs/compatibility.md."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        print_compatibility()
    return f"""# Who serves what beside a sharded cache

"Sharded" means `--dcp-size` > 1, given or through `--attn-tp-size`. Generated from the table that
start-up and every rank validate against (`python -m sglang_helix compatibility`); every row has its
test. Which of it has run on a GPU: [status.md](status.md). What lifting some refusals would take:
[refused.md](refused.md).

The verdict of a server is one of three:

- **works**: the series serves it, and its test asserts what [README](../README.md) promises.
- **own**: SGLang's own `--dcp-size` serves it, as if the series were not installed: no hook in the
  ranks, no argument resolved differently. The series has not proven the answers, and a line of the
  log says so. `--attn-tp-size` and `--dcp-comm-backend symm` do not exist there.
- **refused**: start-up stops with this reason and what to do instead; beams, which a request asks
  for, stop the request.

Own beside works is own. What SGLang alone refuses or gets wrong (the last column) is refused in
every company; a refusal that speaks of the series' own code alone ("starts") does not hold where
the verdict is own, since that code is not there.

The last column says what unmodified SGLang does under `--dcp-size`: *serves* it; serves *MLA*,
while GQA and MHA answer wrongly unless the ranks of a group hold the same heads
(sgl-project/sglang#34355); *starts*, and nothing of its code, tests or docs speaks of it; starts
and is *wrong*, or crashes; *refuses* it; *lacks* it. Files and tests named there are SGLang's
(files below `sglang/srt`): read, not run; no GPU test of this project covers them.
{printed.getvalue()}"""


def capacity() -> str:
    """docs/capacity.md."""
    parts = [
        f"""# Layouts of well-known models

Every legal layout at {" and ".join(map(str, TP_SIZES))} ranks with a bf16 cache and
{MEMORY_GIB} GiB of each rank for it; have your own by `python -m sglang_helix layout --model-path
DIR --tp 8 --kv-memory-gib {MEMORY_GIB}`. Computed from `docs/models/*/config.json`, which hold the
published shapes of these models, by SGLang's ModelConfig and the code that lays out a
server.

How many tokens fit beside plain TP is max(1, KV/N) * K / max(1, KV/A): K times for MLA, N / KV
times for GQA with A <= KV. So at equal K `--attn-tp-size` stores no less than `--dcp-size`; it
removes the gathering of queries and with it one collective a layer. Where A > KV, ranks of
different shards still store the same heads; the smaller A of two rows with equal capacity only adds
exchange.
"""
    ]
    for model in (DOCS / "models" / name for name in CAPACITY):
        shape = shape_of(ModelConfig(str(model)))
        heads = "MLA" if shape.kv_heads is None else f"{shape.kv_heads} key-value heads"
        for tp_size in TP_SIZES:
            parts.append(f"## {model.name}, {tp_size} ranks ({heads})\n")
            parts.append(table(shape, tp_size, MEMORY_GIB, "bf16") + "\n")
            draft = shape._replace(layers=1)  # of the same heads: MTP, EAGLE3
            parts.append(beside_a_draft(shape, draft, tp_size, "bf16") + "\n")
    return "\n".join(parts)


def models() -> str:
    """docs/models.md. Takes minutes: every model is built, without weights."""
    with Builder() as builder, tempfile.TemporaryDirectory() as root:
        return models_page([cells_of(path, builder) for path in listed_models(Path(root))])


def cells_of(path: Path, builder: Builder) -> list[str]:
    """A model's line of docs/models.md."""
    gains, flags = model_layout(path)
    argv = ["--model-path", str(path), *flags]
    answer = check(argv, builder, "Hopper")
    # What layers need does not depend on the machine.
    elsewhere = check(argv, UNBUILT, "Blackwell").verdict
    both = answer.verdict
    if elsewhere != both:
        both += f" ({elsewhere} on Blackwell)"
    why = "" if answer.verdict == "works" and answer.built else first_line(answer.meaning)
    why = why or READ_WITH.get(path.name, "")
    cells = [path.name, both, f"`{' '.join(flags)}`", *gains, answer.attention]
    return [*cells, proven_by(path), why]


def models_page(rows: Sequence[Sequence[str]]) -> str:
    """docs/models.md, from the cells of its table."""
    both = [cells[1].removesuffix(" on Blackwell)").split(" (") for cells in rows]
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    says = "; on Blackwell ".join(
        ", ".join(f"{verdicts[kind]} {kind}" for kind in ("works", "own", "refused"))
        for verdicts in (Counter(one[0] for one in both), Counter(one[-1] for one in both))
    )
    return f"""# Models

{len(lines)} open models that people serve with long contexts in 2026, and what becomes of them on
Hopper GPUs: {says}.
Written by `python docs/render.py models.md`, in some minutes, by `python -m sglang_helix check`,
which resolves a launch and builds every layer without weights; have any model's by the same. What
has run on a GPU: [status.md](status.md).

Half of the configurations are published ones, `docs/models/NAME/config.json`; the others,
`docs/models/others.json`, are of the same classes and heads, and else from memory, with few layers
where a list of them would be long: their verdict and gain are meant, no other size of them.

The flags are for 8 ranks, for 16 where 8 store nothing twice, or for 4 where heads allow neither,
with the least `--dcp-size` that has all the gain. Gain is how many tokens fit, beside plain TP, at
8 and at 16 ranks. "works" says that a server starts and that no layer of it is of a kind that the
series does not compute. The test (of `test/srt`, from `docs/models/proof.json`) compares tokens and
log-probabilities of a tiny model of the same class with `transformers`, not this model itself, or
shows the refusal. GigaChat-3.5, whose class `transformers` lacks, is compared with SGLang's own on
one rank (`models/test_gigachat.py`).

| model | verdict | flags | gain, 8 | 16 | attention by | proven by | why, or what to know |
|---|---|---|---|---|---|---|---|
{chr(10).join(lines)}
"""


# A builder of check's where layers are taken as the series needs them.
UNBUILT: Any = SimpleNamespace(build=lambda argv: ("", ""))


# Published configurations that SGLang 0.5.23 does not read as they are, sharded or not: what the
# copy in docs/models has besides. And what SGLang computes wrongly, sharded or not.
READ_WITH = {
    "LongCat-Flash-Chat": "SGLang builds it where its configuration has a scaling: give "
    "`--json-model-override-args` `rope_scaling` of type yarn and factor 1, which is none. Plain "
    "SGLang answers wrongly: it leaves `routed_scaling_factor` off the experts that give back "
    "their input (`zero_expert_num`), and each of its ranks adds them to what is summed up",
    "MiMo-V2-Flash": 'read with `--trust-remote-code`, or with `rope_parameters` of type "default"',
    "Mistral-Large-3-675B": "as published, in Mistral's format, but for the widths of its vision "
    "tower, which were not at hand. Queries are scaled by position in every chunk and by every "
    "backend, which plain SGLang leaves out in many",
    "Step-3.5-Flash": "read with `--trust-remote-code`, or with an empty `per_layer_config`",
}


def architecture_of(model: Path) -> str:
    """The class that a configuration asks SGLang for."""
    given = model / "config.json"
    if not given.exists():  # of Mistral's own format
        return str(configuration_of(str(model)).hf_config.architectures[0])
    (architecture,) = json.loads(given.read_text())["architectures"]
    return str(architecture)


def proofs() -> dict[str, str]:
    """By class, a test below test/srt, the class of the text that it wraps, or nothing."""
    found: dict[str, str] = json.loads((DOCS / "models/proof.json").read_text())
    return found


def proven_by(model: Path) -> str:
    """A cell of docs/models.md."""
    proof = others().get(model.name, {}).get("proof") or proofs()[architecture_of(model)]
    if text := proofs().get(proof):
        return f"its text's class: `{text}`"
    return f"`{proof}`" if proof else "SGLang refuses it"


def others() -> dict[str, dict[str, Any]]:
    """By model, its configuration, or its entries that are not those of the model that it is like.

    "like": a name in docs/models. "proof": as in proof.json, where it is not that of its class.
    """
    found: dict[str, dict[str, Any]] = json.loads((DOCS / "models/others.json").read_text())
    return found


def published_models() -> list[Path]:
    """The published configurations in docs/models."""
    return sorted(path for path in DOCS.glob("models/*") if path.is_dir())


def listed_models(root: Path) -> list[Path]:
    """The models of docs/models.md: the published ones, and the others, written below root."""
    written = []
    for name, entries in others().items():
        config: dict[str, Any] = {"torch_dtype": "bfloat16"}
        if "like" in entries:
            config = json.loads((DOCS / "models" / entries["like"] / "config.json").read_text())
        written.append(root / name)
        written[-1].mkdir()
        own = {key: value for key, value in entries.items() if key not in ("like", "proof")}
        (written[-1] / "config.json").write_text(json.dumps(_merged(config, own)))
    return sorted([*published_models(), *written], key=lambda path: path.name)


def table_of_models() -> dict[str, list[str]]:
    """By model, its line of docs/models.md as it stands there, in cells."""
    page = (DOCS / "models.md").read_text()
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines()]
    _, _, *lines = [cells for cells in split if len(cells) == 8]
    return {cells[0]: cells for cells in lines}


def _merged(config: dict[str, Any], entries: dict[str, Any]) -> dict[str, Any]:
    """With these entries in the place of its own, in the configurations within it too."""
    return config | {
        key: _merged(config[key], value)
        if isinstance(value, dict) and isinstance(config.get(key), dict)
        else value
        for key, value in entries.items()
    }


def model_layout(model: Path) -> tuple[list[str], list[str]]:
    """The gains at each of TP_SIZES, and the flags of docs/models.md."""
    flags: list[str] = []
    gains = []
    config = configuration_of(str(model))
    for tp_size in (*TP_SIZES, FEW):
        by_gain = {
            gain: asked
            for asked, gain in reversed(layouts(config, tp_size))
            if asked[0] == "--dcp-size"
        }
        most = max(by_gain, default=None)
        if tp_size != FEW:
            gains.append("" if most is None else f"{most:g}x")
        if most is not None and (most > 1 or tp_size == TP_SIZES[-1]) and not flags:
            flags = ["--tp-size", str(tp_size), *by_gain[most]]
    return gains, flags or ["--tp-size", str(TP_SIZES[0]), "--dcp-size", "2"]


def when_it_pays() -> str:
    """docs/when-it-pays.md."""
    parts = [
        """# When a sharded cache pays

Milliseconds from one token to the next, computed for 8 H200s with `symm` and FA3 by the cost
model of `python -m sglang_helix layout --model-path DIR --tp 8 --gpu h200` (with
`--weight-dtype fp8` where config.json does not say what the weights are), which takes your
contexts, your concurrency and other GPUs, lists `a2a` and `ag_rs` too, counts with
`--dcp-replicate-v-proj` where it is given that, and plots
([as here, DeepSeek-V3](figures/when-it-pays.png), `--plot`). "3 fit": the cache holds no more
such requests.

The model is fitted to the servers of [benchmarks.md](benchmarks.md) and within 15% of each of its
rows but those with a draft and of two layers of Llama-3-8B, which wait for the host: it takes less
time than when the model was fitted. `python -m benchmark.dcp fit docs/figures/serve-*.csv` does it
again and prints every row beside its prediction. **Eight GPUs were not measured**, nor any but H100
and H200: what is said of them follows from 2 and 4, and from the vendors' bandwidths. Two layouts
within a few percent of one another are equal. Queries are gathered as a server does it by
default: with `symm` by its kernel, which was not run between more than 2 GPUs, else by NCCL. Of
hybrids a shard of Qwen3-Next was measured.

Not worth it: one request at a time below the length that stands under each table, and models with
as many key-value heads as GPUs, which store nothing twice. There plain TP is faster, and simpler.
"""
    ]
    for name, element, says in PAYS:
        compared = _on_8_h200s(name, element)
        parts.append(f"## {name}, {says} weights, bf16 cache\n")
        parts.append(advice.table(compared, (8192, 32768, 131072, 524288), (1, 8, 32)) + "\n")
    return "\n".join(parts)


def _on_8_h200s(name: str, element: float) -> cost.Advice:
    return cost.advise(
        cost.model_of(ModelConfig(str(DOCS / "models" / name))),
        8,
        cost.GPUS["h200"],
        kv_memory_gib=None,
        cache_bytes=2,
        weight_element=element,
        exchanges=("symm",),
    )


def pays_table() -> str:
    """README's table: plain TP's time per token over the best sharded layout's, on 8 H200s."""
    contexts, requests = (8192, 32768, 131072, 524288), (1, 8, 32)
    lines = [
        "| plain TP's time / sharded | " + " | ".join(map(advice.length, contexts)) + " |",
        "|---" * (1 + len(contexts)) + "|",
    ]
    for name, element, says in PAYS:
        compared = _on_8_h200s(name, element)
        plain, *sharded = compared.choices
        for count in requests:
            cells = []
            for context in contexts:
                held = [one for one in sharded if compared.fits(one, context) >= count]
                if not held:
                    cells.append("do not fit")
                elif compared.fits(plain, context) < count:
                    cells.append("sharded alone fits")
                else:
                    best = min(compared.ms(one, context, count) for one in held)
                    gain = compared.ms(plain, context, count) / best
                    cells.append(f"**{gain:.2f}**" if gain > 1 else f"{gain:.2f}")
            lines.append(f"| {name}, {says} weights, {count} at once | {' | '.join(cells)} |")
    return "\n".join(lines)


def speculative() -> str:
    """docs/speculative.md: what stands between its marks is rendered, the rest is written there."""
    lines = ["| | plain TP | sharded | and the draft | gain | without a draft |", "|" + "---|" * 6]
    for name, tp_size in DRAFTED:
        shape = shape_of(ModelConfig(str(DOCS / "models" / name)))
        draft = shape._replace(layers=1)
        both = [list(rows(shape, tp_size, 0, CACHE_BYTES["bf16"], one)) for one in (None, draft)]
        plain, most = both[1][0].kv_bytes, 1.0
        for alone, drafted in zip(*both, strict=True):
            size = alone.layout.kvp_size
            if alone.ratio > most:
                most = alone.ratio
                own = f"{alone.kv_bytes / size:,.0f} | {drafted.kv_bytes / size:,.0f}"
                gains = f"{drafted.ratio:.2f}x | {alone.ratio:g}x"
                lines.append(
                    f"| {name}, {tp_size} ranks, K = {size} | {plain:,} | {own} | {gains} |"
                )
    return between_marks((DOCS / "speculative.md").read_text(), "from layout.py", "\n".join(lines))


def between_marks(page: str, source: str, rendered: str) -> str:
    """A page's text with this where it marks what is rendered."""
    first, last = f"<!-- {source} -->\n", "<!-- end -->\n"
    before, rest = page.split(first)
    return before + first + "\n" + rendered + "\n\n" + last + rest.split(last, 1)[1]


def readme() -> str:
    """README.md: what stands between its marks is rendered."""
    text = between_marks((DOCS / README).read_text(), "from cost.py", pays_table())
    text = between_marks(text, "from figures", measured.readme())
    return between_marks(text, "from adapters.py", textwrap.fill(backends_sentence(), 110))


def benchmarks() -> str:
    """docs/benchmarks.md: what stands between its marks is rendered, the rest is written there."""
    text = (DOCS / "benchmarks.md").read_text()
    for name, made in measured.TABLES.items():
        text = between_marks(text, f"from figures: {name}", made())
    return text


def attention_backends() -> str:
    """docs/attention-backends.md."""
    lines = []
    for record in ADAPTERS:
        serves = [_server(record, kind) for kind in ATTENTIONS]
        needs = ["CPU or any GPU" if record.off_cuda else "any NVIDIA GPU"]
        if record.majors:
            needs = [f"compute capability {_majors(record.majors)}"]
        if record.mla_majors:
            needs.append(f"{_majors(record.mla_majors)} for MLA")
        needs += [f"no fp8 cache for {kind}: {reason}" for kind, reason in record.no_fp8.items()]
        needs += [f"no drafts for {kind}: {reason}" for kind, reason in record.no_drafts.items()]
        if record.no_e5m2:
            needs.append("an fp8 cache in e4m3 alone")
        if record.pages:
            needs.append(f"pages of {' or '.join(map(str, record.pages))}")
        if record.gqa and not record.windows:
            needs.append("no sliding windows")
        for kind in filter(record.classes, ATTENTIONS):
            majors = [major for major in record.unseen(kind) if major]
            gpu = f"a GPU of {_majors(majors)}" if majors else "a GPU"
            if record.unseen(kind):
                needs.append(f"**no server seen on {gpu}** with {kind}: only where it is named")
            elif not (record.own_class(kind) or seen_on_gpus(record.name, kind)):
                needs.append(f"**no server seen on {gpu}** with {kind}")
        base = "2" if record.base2 else "e"
        lines.append(f"| `{record.name}` | {' | '.join(serves)} | {'; '.join(needs)} | {base} |")
    return (
        """# Attention backends under a sharded cache

Generated from the table of adapters (`python/sglang_helix/srt/layers/attention/adapters.py`), in
order of preference. Where none is named, SGLang's default for the machine is kept if it is here,
unless no server on such a GPU has run its adapter ([status.md](status.md)); otherwise the first
that serves the model and runs on the machine is taken, and the log says so. "own": complete
upstream, with the series' exchange. To add one:
[CONTRIBUTING.md](../CONTRIBUTING.md#1-add-an-adapter-for-one-of-sglangs-attention-backends).

| `--attention-backend` | GQA, MHA | MLA | needs | base of its LSE |
|---|---|---|---|---|
"""
        + "\n".join(lines)
        + "\n"
    )


def _server(record: Adapter, kind: Attention) -> str:
    if record.own_class(kind):
        return "adapter"
    drafts = "; adapter for drafts" if record.own_class(kind, drafts=True) else ""
    return "own" + drafts if record.classes(kind) else ""


def status() -> str:
    """docs/status.md: what stands between its marks is rendered, the rest is written there."""
    lines = ["| what | " + " | ".join(PLACES) + " |", "|---" * (1 + len(PLACES)) + "|"]
    for record in ADAPTERS:
        for kind in filter(record.classes, ATTENTIONS):
            cells = [", ".join(_seen_features(record, kind, place)) for place in PLACES]
            lines.append(f"| `{record.name}`, {kind} | {' | '.join(cells)} |")
    for part in PARTS:
        cells = ["✓" if part.at(place) else "" for place in PLACES]
        lines.append(f"| {part.what} | {' | '.join(cells)} |")
    lines += ["", "How:", ""]
    lines += [f"- `{one.backend}`, {one.attention}, {one.place}: {one.how}." for one in SEEN]
    for part in PARTS:
        hows = [f"{place}: {part.at(place)}" for place in PLACES if part.at(place)]
        lines.append(f"- {part.what}. {'. '.join(hows)}.")
    return between_marks((DOCS / "status.md").read_text(), "from seen.py", "\n".join(lines))


def _seen_features(record: Adapter, kind: Attention, place: Place) -> Iterator[str]:
    for feature in FEATURES:
        if kind in {"fp8": record.no_fp8, "verify": record.no_drafts}.get(feature, ()):
            yield f"no {feature}"
        elif feature in seen(record.name, kind, place):
            yield f"**{feature}**"


def _majors(majors: Iterable[int]) -> str:
    return " or ".join(f"{major}.x" for major in majors)


def backends_sentence() -> str:
    """README's sentence about attention backends."""
    gqa, mla = (_listed([f"`{record.name}`" for record in serving(kind)]) for kind in ATTENTIONS)
    return f"Attention backends under a sharded cache: {gqa} for GQA and MHA; {mla} for MLA."


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]])


PAGES = {
    README: readme,
    "benchmarks.md": benchmarks,
    "compatibility.md": compatibility,
    "capacity.md": capacity,
    "when-it-pays.md": when_it_pays,
    "attention-backends.md": attention_backends,
    "status.md": status,
    "speculative.md": speculative,
}

# Too slow to be compared with at every test: written where it is named.
SLOW_PAGES = {"models.md": models}

if __name__ == "__main__":
    asked = {name: {**PAGES, **SLOW_PAGES}[name] for name in sys.argv[1:]} or PAGES
    for name, render in asked.items():
        (DOCS / name).write_text(render())
        print(f"wrote {DOCS / name}")
