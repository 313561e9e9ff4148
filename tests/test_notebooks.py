"""The notebooks run from the first cell to the last, and lie in the repository with their outputs."""

from __future__ import annotations

import os
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", os.environ.get("PYTHONWARNINGS", ""))
    notebook = nbformat.read(path, as_version=4)
    shapes = [[output.output_type for output in cell.outputs] for cell in code(notebook)]
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for cell, kept in zip(code(notebook), shapes, strict=True):
        assert ("execute_result" in kept) == any(
            output.output_type == "execute_result" for output in cell.outputs
        ), f"{path.name}: run `make notebooks`"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_with_its_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    text = path.read_text(encoding="utf-8")
    assert '"output_type": "error"' not in text
    for word in ("/home/", "/root/", "/tmp/", "/work/"):
        assert word not in text, f"{path.name} tells where it was run: {word}"
    assert path.stat().st_size < 200_000


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]
