"""The notebooks data and hub run from top to bottom on a small synthetic Sun, and say and show what they promise."""

import re
import subprocess

import nbformat
import pytest
from exercises import check_exercises, folder_with_answers

from helpers.channels import ERROR_BOUND
from helpers.tools.run_notebook import main

pytestmark = [pytest.mark.notebook, pytest.mark.xdist_group("data_notebook")]

SMALL = [
    "synthetic.visits=14 data.native_size=128 paths.reserve_gb=0.1",
    "split.train=[2014-01-01, 2014-01-15] split.val=[2014-01-17, 2014-01-22] split.test=[2014-01-24, 2014-01-29]",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run a notebook with its answers, in a shared folder of this module; returns the executed cells."""
    folder = tmp_path_factory.mktemp("data")
    root = folder_with_answers(folder / "course")

    def execute(name, task="flare"):
        words = [name, "--profile", "tiny", "--task", task, "--parameters", *SMALL, f"paths.runs={folder / 'runs'}"]
        assert main(words, root=root) == 0
        return nbformat.read(folder / "runs" / f"{name}-{task}-tiny-001" / f"{name}.ipynb", as_version=4).cells

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SURYA_SHARED", str(folder / "shared"))
        yield execute


@pytest.fixture(scope="module")
def hub(run):
    return run("hub")


@pytest.fixture(scope="module")
def data(run, hub):  # on the Sun that hub has drawn
    return run("data")


def texts(cells):
    """All that the code cells print or return, as plain text."""
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


def pages(cells, source):
    """The HTML that the one code cell with this source shows."""
    (cell,) = [cell for cell in cells if cell.cell_type == "code" and source in cell.source]
    return "".join(output.get("data", {}).get("text/html", "") for output in cell.outputs)


def has_figure(cells, source):
    found = [cell for cell in cells if cell.cell_type == "code" and source in cell.source]
    return any("image/png" in output.get("data", {}) for cell in found for output in cell.outputs)


@pytest.mark.parametrize("name", ["data", "hub"])
def test_their_exercises_are_wrong_as_given_and_right_as_answered(request, name):
    cells = request.getfixturevalue(name)
    check_exercises(cells)
    assert "Traceback" not in texts(cells) and "Warning" not in texts(cells)


def test_data_goes_from_labels_to_one_batch(data):
    said = texts(data)
    assert re.search(r"^train: \d+ samples; dropped [1-9]\d* ", said, re.MULTILINE)
    assert "The windows of split.train and split.val overlap by" in said
    assert "Hagyard" in pages(data, "synthetic.__doc__")
    assert all(has_figure(data, source) for source in ("plots.plot_labels(", "plots.show(", "plots.show_error("))
    errors = re.findall(r"\de-\d\d", pages(data, '"round trip"'))
    assert len(errors) == 13 and max(map(float, errors)) <= 1e-5
    assert "16.36" in pages(data, "frames.COMPRESSED") and "567.1" in pages(data, "frames.FILE_GB")
    assert "batch, channel, time, y, x" in said and "(8, 13, 2, 64, 64)" in said


def test_data_bears_a_task_whose_labels_are_images(run, hub):
    assert "batch, channel, y, x" in texts(run("data", "translation"))


def test_hub_says_where_things_are_and_builds_each_frame_once(hub):
    said = texts(hub)
    assert re.search(r"^paths.labels +.*sun-0\" +<- profiles.tiny in config.yaml$", said, re.MULTILINE)
    assert "the environment variable SURYA_SHARED" in pages(hub, "you may write there")
    assert re.search(r"\b2 built in .*, 0 there already", said) and re.search(r"\b0 built, 2 there already", said)
    assert float(re.search(r"largest difference to a fresh reduction: (\S+)", said)[1]) < ERROR_BOUND
    assert float(re.search(r"tensor .* ms: (\d+) times faster", said)[1]) > 1
    assert has_figure(hub, "plots.plot_channels(")


def test_hub_shows_a_full_disk_and_who_takes_the_room(hub):
    said = texts(hub)
    assert "Writing a store that cannot fit takes" in said and "`du -hd 3 " in said
    assert re.search(r"^[\d.]+[KMG]\s+/\S+/surya-course\s", said, re.MULTILINE)


def test_hub_shows_a_conflict_as_git_would(hub):
    assert "<<<<<<< local\nlr = 5e-4\n=======\nlr = 1e-3  # of the adapters\n>>>>>>> remote" in texts(hub)


def test_hub_looks_at_git_and_bears_a_folder_without(hub, tmp_path):
    (cell,) = [cell for cell in hub if cell.source.startswith("!git status")]
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
