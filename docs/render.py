"""`make notebooks`: runs the notebooks and writes them with their results as Markdown and PNG into docs/notebooks/."""

import base64
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import jupytext
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
LINES = 40
"""Lines of printed text that are kept of a cell."""


def execute(file: Path) -> Any:
    """The notebook with its outputs; raises nbclient's `CellExecutionError` where a cell fails."""
    notebook = jupytext.read(file)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, kernel_name="python3", timeout=900, resources={"metadata": {"path": folder}}).execute()
    return notebook


def shown(output: Any, picture: Path) -> list[str]:
    """An output as Markdown; a picture is written beside it."""
    data = output.get("data", {})
    if "image/png" in data:
        picture.write_bytes(base64.b64decode(data["image/png"]))
        return [f"![{picture.stem}]({picture.name})"]
    if "text/markdown" in data:
        return [data["text/markdown"]]
    text = output.get("text", "") if output.get("name") != "stderr" else ""
    text = re.sub(r"\x1b\[[0-9;]*m|/tmp/tmp\w+/?", "", text or data.get("text/plain", ""))
    text = re.sub(r"^/\S+: \w+Warning: .*\n(  .*\n)?", "", text, flags=re.MULTILINE)
    lines = [line.rstrip() for line in text.rstrip().splitlines()]
    if not lines or re.fullmatch(r"\[?(<.*>|Text\(.*\)).*", lines[0]):  # what pyplot returns
        return []
    kept = lines if len(lines) <= LINES else [*lines[: LINES // 2], "…", *lines[-LINES // 2 :]]
    return ["```text", *kept, "```"]


def joined(page: str) -> str:
    """The page with texts that follow one another as one block."""
    before = None
    while before != page:
        before, page = page, re.sub(r"(^```text\n(?:(?!```).*\n)*)```\n\n```text\n", r"\1", page, flags=re.MULTILINE)
    return page


def render(file: Path, folder: Path) -> None:
    """Writes one notebook."""
    notebook = execute(file)
    parts = [f"<!-- made of notebooks/{file.name} by make notebooks -->"]
    for old in folder.glob(f"{file.stem}-*.png"):
        old.unlink()
    pictures = 0
    for cell in notebook.cells:
        parts += [cell.source] if cell.cell_type == "markdown" else [f"```python\n{cell.source}\n```"]
        for output in cell.get("outputs", []):
            pictures += "image/png" in output.get("data", {})
            parts.append("\n".join(shown(output, folder / f"{file.stem}-{pictures}.png")))
    page = joined("\n\n".join(part for part in parts if part) + "\n")
    (folder / f"{file.stem}.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    folder = ROOT / "docs/notebooks"
    folder.mkdir(exist_ok=True)
    for file in sorted((ROOT / "notebooks").glob("[0-9]*.py")):
        if not sys.argv[1:] or any(word in file.name for word in sys.argv[1:]):
            render(file, folder)
            print(f"docs/notebooks/{file.stem}.md")
