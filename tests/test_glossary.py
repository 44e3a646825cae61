"""The glossary: the ten words, each in two sentences, linked by its heading; and numbers that are right."""

import math
import re
from pathlib import Path

import nbformat
import pytest
import torch

from helpers.training.metrics import NUMBERS, PROBABILITIES, SCORES

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
TEXT = (NOTEBOOKS / "glossary.md").read_text()
WORDS = ["Epoch", "Step", "Token", "Logit", "Adapter", "Warm-up", "bf16", "Seed", "Skill score", "Weight decay"]


def test_ten_words_have_two_sentences_each():
    entries = dict(re.findall(r"^## (.+)\n((?:.+\n)+)", TEXT, re.MULTILINE))
    assert list(entries) == WORDS
    for word, text in entries.items():
        assert len(re.findall(r"\.(?=\s)", text)) == 2, word


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("[!m]*.ipynb")), ids=lambda path: path.stem)
def test_links_to_it_find_their_heading(path):
    headings = {heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.+)", TEXT, re.MULTILINE)}
    text = "".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
    assert set(re.findall(r"glossary\.md#([\w-]+)", text)) <= headings


def test_its_example_and_its_bad_values_are_right():
    counts = [torch.tensor([float(n)]) for n in (30, 20, 10, 140)]
    tss, hss = (SCORES[name](*counts).item() for name in ("tss", "hss"))
    assert f"TSS = 30/40 − 20/160 = {tss:.3f}, HSS = {hss:.2f}" in TEXT
    rare = torch.tensor([1.0] + 9 * [0.0]).numpy()
    assert f"{PROBABILITIES['log_loss'](rare, 0 * rare + 0.1):.2f} there" in TEXT
    truth = torch.arange(5.0)[:, None]
    of_mean = {name: NUMBERS[name].compute(truth.mean().expand(5, 1), truth).item() for name in ("r2", "rrse")}
    assert of_mean == {"r2": 0.0, "rrse": 1.0} and math.isclose(1 - 0.6**2, 0.64)
