"""From which batch on MLA's values are projected before the exchange; see `value_projection`.

The figure is in `value_switch.json` beside this module. Importing it imports neither SGLang nor
torch.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_suffix(".json")


class Switch(NamedTuple):
    """The same for every rank, and for every graph: it goes by the tokens of a pass."""

    from_tokens: int
    measured_on: str | None
    """A GPU. None: arithmetic, from bytes and bandwidths."""

    def pays(self, tokens: int) -> bool:
        """Whether a pass of so many tokens projects its values first."""
        return tokens >= self.from_tokens

    def __str__(self) -> str:
        """As the log and `layout` say it."""
        return f"{self.from_tokens} tokens and more ({self.measured_on or 'not measured'})"


@functools.cache
def switch() -> Switch:
    """The figure that the package ships."""
    return Switch(**json.loads(FILE.read_text()))
