"""Generated pages are what the code would write, and links in the docs lead somewhere."""

import re
from pathlib import Path

import pytest
import render

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", render.PAGES)
def test_page_is_current(page: str) -> None:
    assert (ROOT / "docs" / page).read_text() == render.PAGES[page](), "run: python docs/render.py"


@pytest.mark.parametrize(
    "path",
    [path for folder in (".", "docs", "benchmark") for path in sorted(ROOT.glob(f"{folder}/*.md"))],
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_index_has_every_page() -> None:
    index = (ROOT / "docs/README.md").read_text()
    assert [p.name for p in ROOT.glob("docs/*.md") if f"]({p.name})" not in index] == ["README.md"]


def test_models_page_is_of_these_models(tmp_path: Path) -> None:
    """Who is in it, and the gains. Its verdicts: `srt/compatibility/test_check.py`."""
    rows = render.table_of_models()
    written = render.models_page([*rows.values()])
    assert (ROOT / "docs/models.md").read_text() == written, "run: python docs/render.py models.md"
    models = render.listed_models(tmp_path)
    assert list(rows) == [path.name for path in models]
    for path in models:
        gains, flags = render.model_layout(path)
        assert rows[path.name][2:5] == [f"`{' '.join(flags)}`", *gains]
        assert rows[path.name][6] == render.proven_by(path)
        assert "could not be built" not in rows[path.name][7]
