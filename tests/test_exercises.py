"""The frame of the exercises."""

import nbformat
import pytest
from exercises import with_answers

from helpers.analysis.exercises import attempt


@pytest.mark.parametrize(
    ("wrong", "told"),
    [("assert 1 > 2, 'count again'", "count again"), ("None + 1", "unsupported"), ("assert 0", "AssertionError")],
)
def test_a_wrong_attempt_is_told_and_stops_nothing(capsys, wrong, told):
    with attempt():
        exec(wrong)
    assert (said := capsys.readouterr().out).startswith("Not yet.") and told in said


def test_a_right_attempt_is_told(capsys):
    with attempt():
        assert 2 > 1
    assert capsys.readouterr().out == "Right.\n"


def test_the_answer_takes_the_place_of_the_stub():
    stub = nbformat.v4.new_code_cell(
        "guess = None\nwith attempt():\n    assert guess == 2", metadata={"tags": ["exercise"]}
    )
    text = "<details><summary>Answer</summary>\n\nBecause.\n\n```python\nguess = 2\n```\n\n</details>"
    answered = with_answers(nbformat.v4.new_notebook(cells=[stub, nbformat.v4.new_markdown_cell(text)])).cells
    assert [cell.source for cell in answered][2] == "guess = 2\nwith attempt():\n    assert guess == 2"
    with pytest.raises(AssertionError, match="no folded answer"):
        with_answers(nbformat.v4.new_notebook(cells=[stub, nbformat.v4.new_markdown_cell("nothing")]))
