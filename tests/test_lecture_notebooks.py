"""`learning_rate` and `compare` run from top to bottom on a small synthetic Sun, and say what they promise."""

import re

import nbformat
import pytest
from exercises import check_exercises, folder_with_answers

from helpers.analysis import comparison
from helpers.config import load_config, parse_parameters
from helpers.tools.command import ROOT
from helpers.tools.run_notebook import main

pytestmark = [pytest.mark.notebook, pytest.mark.xdist_group("lecture_notebooks")]

SMALL = [
    "synthetic.visits=16 data.native_size=128 paths.reserve_gb=0 training.batch_size=4",
    f"model.weights={ROOT}/helpers/data/surya.tiny.pt",
    "split.train=[2014-01-01, 2014-01-15] split.val=[2014-01-17, 2014-01-23] split.test=[2014-01-25, 2014-02-02]",
    "target.event_threshold=null",
    "diagnostics.sweep_epochs=2 diagnostics.range_steps=30",
    "training.epochs=2 compare.seeds=[0,1] compare.train_samples=[6,null] compare.draws=20",
]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Runs a notebook in a shared folder of its own; its printed text, and how many figures it has."""
    folder = tmp_path_factory.mktemp("lecture")
    root = folder_with_answers(folder / "root")

    def run(name: str) -> tuple[str, int]:
        assert (
            main(
                [name, "--profile", "tiny", "--task", "flare", "--parameters", *SMALL, f"paths.runs={folder}/runs"],
                root=root,
            )
            == 0
        )
        newest = max((folder / "runs").glob(f"{name}-flare-tiny-*/{name}.ipynb"))
        cells = nbformat.read(newest, as_version=4).cells
        check_exercises(cells)
        outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
        said = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]
        return "\n".join(said), sum("image/png" in output.get("data", {}) for output in outputs)

    run.runs = folder / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SURYA_SHARED", str(folder / "shared"))
        yield run


def test_learning_rate(executed):
    said, figures = executed("learning_rate")
    assert figures == 3 and "Traceback" not in said and "Warning" not in said
    assert re.search(r"suggested: [\d.]+e-\d\d; training.lr is 3.0e-03", said)
    assert len(re.findall(r"^lr [\d.]+e[+-]\d\d  \w+", said, re.M)) == 4 and "(limit 0.15)" in said
    assert len(re.findall(r"^(?:probe|lora|full|scratch)  [a-z ()]+: rise ", said, re.M)) == 4
    assert re.search(r"bf16 and fp32 differ by \d\.\d+, seeds by \d\.\d+: (within|beyond) the spread", said)
    deviation = re.search(r"activations and gradients, measured: [\d.]+ MB \(([+-]\d+)%\)", said)
    assert abs(int(deviation[1])) <= 20


def test_compare_trains_what_is_missing(executed):
    said, figures = executed("compare")
    assert figures == 3 and "Traceback" not in said and "Warning" not in said
    assert len(re.findall(r"^trained: \w+-flare-tiny-\d+ ", said, re.M)) == 10  # LoRA is there, the head alone is not
    assert len(re.findall(r"(?:WITHIN NOISE|is better|is WORSE).* \d+ test days", said)) >= 2
    # a second call would find them all
    asked = {
        "profile": "tiny",
        "task": "flare",
        "parameters": parse_parameters([*SMALL, f"paths.runs={executed.runs}"]),
    }
    for experiment, changes in comparison.plan(load_config(**asked)):
        trial = load_config(**asked, experiment=experiment, overrides=changes)
        assert comparison.find_run(trial)
