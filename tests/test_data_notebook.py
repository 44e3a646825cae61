"""The data notebook runs from top to bottom on a small synthetic Sun, and says and shows what it promises."""

import re
import subprocess

import nbformat
import pytest

from helpers.channels import ERROR_BOUND
from helpers.tools.run_notebook import main

pytestmark = [pytest.mark.notebook, pytest.mark.xdist_group("data_notebook")]

SMALL = [
    "synthetic.visits=14 data.native_size=128 paths.reserve_gb=0",
    "split.train=[2014-01-01, 2014-01-15] split.val=[2014-01-17, 2014-01-22] split.test=[2014-01-24, 2014-01-29]",
]


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """The cells of the executed notebook, run in a shared folder of its own."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SURYA_SHARED", str(folder / "shared"))
        words = ["data", "--profile", "tiny", "--task", "flare", "--parameters", *SMALL]
        assert main([*words, f"paths.runs={folder / 'runs'}"]) == 0
    return nbformat.read(folder / "runs" / "data-flare-tiny-001" / "data.ipynb", as_version=4).cells


def texts(notebook):
    """All that the code cells print or return, as plain text."""
    outputs = [output for cell in notebook if cell.cell_type == "code" for output in cell.outputs]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


def test_it_shows_the_figures(cells):
    titles = (
        "plots.plot_labels(",
        "to_signed_log(x",
        "plots.show_error(",
        "plots.plot_channels(",
        ".plot.bar(",
    )
    for title in titles:
        (cell,) = [cell for cell in cells if cell.cell_type == "code" and title in cell.source]
        assert [output for output in cell.outputs if "image/png" in output.get("data", {})], title


def test_it_says_what_was_found_and_what_was_done(cells):
    said = texts(cells)
    assert "the environment variable SURYA_SHARED" in said
    assert re.search(r"\d+ frames present, \d+ missing, from 2014-01-01", said)
    assert re.search(r"\b[1-9]\d* built in .*, 0 there already", said)
    assert re.search(r"\b0 built, [1-9]\d* there already", said)
    assert float(re.search(r"largest difference to a fresh reduction: (\S+)", said)[1]) < ERROR_BOUND
    assert float(re.search(r"tensor .* ms: (\d+) times faster", said)[1]) > 1
    assert "batch, channel, time, y, x" in said and "(8, 13, 2, 64, 64)" in said


def test_it_fails_on_purpose_with_sentences(cells):
    said = texts(cells)
    assert "The windows of split.train and split.val overlap by" in said
    assert "Writing a store that cannot fit takes" in said and "`du -hd 3 " in said
    # and that command shows who takes the room
    assert re.search(r"^[\d.]+[KMG]\s+/\S+/surya-course\s", said, re.MULTILINE)
    assert "Traceback" not in said and "Warning" not in said


def test_the_round_trip_of_every_channel_is_exact_to_rounding(cells):
    (cell,) = [cell for cell in cells if '"round trip"' in cell.source and cell.cell_type == "code"]
    errors = re.findall(r"\de-\d\d", cell.outputs[0]["data"]["text/html"])
    assert len(errors) == 13 and max(map(float, errors)) <= 1e-5


def test_it_looks_at_git_and_bears_a_folder_without(cells, tmp_path):
    (cell,) = [cell for cell in cells if cell.source.startswith("!git status")]
    said = texts([cell])
    assert "## " in said or "No git here" in said  # the branch, where the tests run in a clone
    for name in ("git", "no git"):
        (tmp_path / name).mkdir()
    (tmp_path / "git" / "git").symlink_to("/bin/false")
    for path in (tmp_path / "git", tmp_path / "no git"):  # no repository, no command
        for line in cell.source.splitlines():
            words = ["/bin/sh", "-c", line.removeprefix("!")]
            done = subprocess.run(words, cwd=tmp_path, env={"PATH": str(path)}, capture_output=True, text=True)
            assert done.returncode == 0 and done.stdout.startswith("No "), done.stderr
