"""One row of the compatibility table: a feature that meets a sharded cache, and who serves it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sglang_helix.srt.compatibility.situation import Situation

Status = Literal["works", "own", "refused"]

# What unmodified SGLang does with the feature beside `--dcp-size`.
Alone = Literal["", "serves", "MLA", "starts", "wrong", "refuses", "lacks"]

# A feature's value where it is in use, else None.
Given = Callable[[Situation], object | None]

# What several rows advise.
WITHOUT = "Leave the flag out, or leave --dcp-size out"
A2A = "Use --dcp-comm-backend a2a"
PLAIN = "Serve this model without --dcp-size"


@dataclass(frozen=True)
class Row:
    """One feature.

    feature: what it is called. flag: how a user asks for it ("" where the model brings it).
    status: of the feature beside a sharded cache: the series serves it (works), SGLang does, as it
        is and without the series (own), or start-up stops (refused).
    why: reason or, for what works, its evidence.
    instead: what to do where it is refused; no full stop, "--dcp-size" becomes the flag given.
    given: its value where it is in use, else None.
    alone: what SGLang does without the series: it serves; serves MLA alone; starts, and nothing of
        its code, tests or docs speaks of it; starts, and crashes or answers wrongly; refuses; or
        has no such thing. Default: MLA for what works, starts for what is refused.
    proof: of `alone`, where SGLang serves or is wrong: its code (below sglang/srt), test or thread.
    sizes: values of `--dcp-size` with which it is served after all.
    """

    feature: str
    flag: str
    status: Status
    why: str
    instead: str = ""
    given: Given = lambda situation: None
    alone: Alone = ""
    proof: str = ""
    sizes: Callable[[Situation], list[int]] = lambda situation: []

    def in_use(self, situation: Situation) -> bool:
        """Whether the situation has the feature."""
        value = self.given(situation)
        return value is not None and value is not False

    @property
    def by_sglang(self) -> Alone:
        """`alone`, with its default."""
        return self.alone or ("MLA" if self.status == "works" else "starts")

    @property
    def fails_alone(self) -> bool:
        """Whether the refusal holds where SGLang runs without the series too."""
        return self.by_sglang in ("wrong", "refuses")

    def refusal(self, situation: Situation, own: tuple[str, ...] = ()) -> str | None:
        """The error for a start-up that asks for it; None where it does not or it is served.

        own: the features by which SGLang serves the rest of the situation by itself, if any.
        """
        value = self.given(situation)
        if self.status != "refused" or value is None or value is False:
            return None
        asked = f"{self.flag} {value}" if self.flag and value is not True else self.flag
        subject = asked or f"{self.feature} ({' '.join(situation.model.hf_config.architectures)})"
        flag, size = situation.sharded_by
        instead = self.instead if own else self.instead.replace("--dcp-size", flag)
        beside = f"{flag} {size}"
        if own:
            beside = f"SGLang's own --dcp-size, which serves {', '.join(own)} here"
        if sizes := self.sizes(situation):
            instead += f", or --dcp-size {' or '.join(map(str, sizes))} beside {self.flag}"
        return f"{subject} is not supported with {beside}: {self.why}. {instead}."
