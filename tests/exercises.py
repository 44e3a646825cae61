"""Exercises of the notebooks: a code cell tagged `exercise`, then a markdown cell with the folded answer.

The code cell has the reader's lines, then `with attempt():` and the asserts. The answer's Python block takes the place
of the reader's lines.
"""

import re
import shutil
from itertools import pairwise
from pathlib import Path

import nbformat

from helpers.tools.command import ROOT

CHECK = re.compile(r"^with (exercises\.)?attempt\(\):", re.MULTILINE)


def with_answers(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook with a cell after each folded answer, which has it in the place of the reader's lines."""
    cells = notebook.cells[:1]
    for before, cell in pairwise(notebook.cells):
        cells.append(cell)
        if "exercise" in before.metadata.get("tags", []):
            answer = re.search(
                r"<details><summary>Answer</summary>\n\n.*?```python\n(.+?)\n```.*</details>", cell.source, re.DOTALL
            )
            assert answer, f"no folded answer follows the exercise\n{before.source}"
            source = f"{answer[1]}\n{before.source[CHECK.search(before.source).start() :]}"
            cells.append(nbformat.v4.new_code_cell(source, metadata={"tags": ["answer"]}))
    return nbformat.v4.new_notebook(cells=cells, metadata=notebook.metadata)


def folder_with_answers(folder: Path) -> Path:
    """A folder laid out like the project, for `run_notebook.main(..., root=)`, with the answers in its notebooks."""
    (folder / "notebooks").mkdir(parents=True)
    shutil.copy(ROOT / "config.yaml", folder)
    (folder / "helpers").symlink_to(ROOT / "helpers")  # with the weights of the tiny model
    (folder / "notebooks" / "images").symlink_to(ROOT / "notebooks" / "images")
    for path in (ROOT / "notebooks").glob("[!m]*.ipynb"):  # not those called my_...
        nbformat.write(with_answers(nbformat.read(path, as_version=4)), folder / "notebooks" / path.name)
    return folder


def check_exercises(cells: list[nbformat.NotebookNode], at_least: int = 3) -> None:
    """In an executed notebook of `folder_with_answers` every stub fails its asserts and every answer passes them."""

    def said(tag: str) -> list[str]:
        tagged = [cell for cell in cells if tag in cell.metadata.get("tags", [])]
        return ["".join(output.get("text", "") for output in cell.outputs) for cell in tagged]

    stubs, answers = said("exercise"), said("answer")
    assert len(stubs) == len(answers) >= at_least
    for stub, answer in zip(stubs, answers, strict=True):
        assert "Not yet." in stub and "Right." not in stub, stub
        assert "Right." in answer and "Not yet." not in answer, answer
