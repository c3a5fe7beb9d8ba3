"""The notebooks run from end to end, with few steps; what they claim to be exact is asserted in them."""

import sys
from pathlib import Path

import jupytext
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
from render import execute, shown  # noqa: E402

NOTEBOOKS = sorted(path.name for path in (ROOT / "notebooks").glob("*.py"))


def test_notebooks_are_text_and_rendered():
    assert len(NOTEBOOKS) == 4
    assert [path.name for path in (ROOT / "notebooks").iterdir() if path.suffix != ".py"] == []
    for name in NOTEBOOKS:
        page = (ROOT / "docs/notebooks" / name).with_suffix(".md").read_text(encoding="utf-8")
        for cell in jupytext.read(ROOT / "notebooks" / name).cells:
            assert cell.source in page, f"make notebooks: {name} has changed since"
        for picture in [line for line in page.splitlines() if line.startswith("![")]:
            assert (ROOT / "docs/notebooks" / picture.partition("(")[2].removesuffix(")")).is_file()
    assert sum(file.stat().st_size for file in (ROOT / "docs/notebooks").iterdir()) < 1_000_000


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name, monkeypatch):
    monkeypatch.setenv("DIFFX_NOTEBOOK_STEPS", "8")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = execute(ROOT / "notebooks" / name)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_what_is_shown_of_an_output(tmp_path):
    picture = tmp_path / "p.png"
    assert shown({"data": {"image/png": "aGk="}}, picture) == ["![p](p.png)"]
    assert picture.read_bytes() == b"hi"
    assert shown({"name": "stdout", "text": "\x1b[1ma\x1b[0m /tmp/tmpxyz/runs\n"}, picture) == [
        "```text",
        "a runs",
        "```",
    ]
    assert shown({"name": "stderr", "text": "a warning"}, picture) == []
    assert shown({"data": {"text/plain": "<matplotlib.legend.Legend at 0x7f>"}}, picture) == []
    assert len(shown({"name": "stdout", "text": "a\n" * 500}, picture)) < 50
