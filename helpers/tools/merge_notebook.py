"""How git merges notebooks here: nbdime does it cell by cell, and cells that both sides added are all kept.

On its own, nbdime 4.0 reports a conflict, but marks none, where one side added cells beside a cell that the other
changed; and it fails, and writes nothing, where both added cells at the same place.
"""

import sys
from collections.abc import Sequence

import nbformat
from nbdime.diffing.notebooks import diff_notebooks
from nbdime.merging.decisions import MergeDecision, apply_decisions
from nbdime.merging.generic import decide_merge_with_diff
from nbdime.merging.notebooks import notebook_merge_strategies
from nbdime.utils import read_notebook
from nbformat import NotebookNode


def main(argv: Sequence[str]) -> int:
    """Write the merge of BASE OURS THEIRS into OURS, as git wants it; returns 1 if a conflict is marked in it."""
    base, ours, theirs, name = argv
    try:
        given = [read_notebook(path, on_null="minimal", on_empty="minimal") for path in (base, ours, theirs)]
        merged, conflict = merge(*given)
        nbformat.write(merged, ours)
    except Exception as error:  # whatever it is: your file stays as it was, and git calls it a conflict
        print(f"{name} could not be merged cell by cell ({type(error).__name__}: {error}). It holds your version; the")
        print(f"template's one is printed by: git show 'MERGE_HEAD:{name}'")
        return 1
    return int(conflict)


def merge(base: NotebookNode, ours: NotebookNode, theirs: NotebookNode) -> tuple[NotebookNode, bool]:
    """The three-way merge, and whether it holds conflicts: cells with both versions between <<<<<<< and >>>>>>>."""
    strategies = notebook_merge_strategies(None)
    strategies["/metadata"] = "use-local"  # your kernel stays yours
    differences = diff_notebooks(base, ours), diff_notebooks(base, theirs)
    decisions = keep_added_cells(decide_merge_with_diff(base, ours, theirs, *differences, strategies))
    return apply_decisions(base, decisions), any(decision.conflict for decision in decisions)


def keep_added_cells(decisions: Sequence[MergeDecision]) -> list[MergeDecision]:
    """Cells that only one side adds contradict nothing: at the same place ours come first, then theirs."""
    kept, joined = [], {}  # joined: place in the notebook -> the two sides that add cells there
    for decision in decisions:
        sides = decision.local_diff or [], decision.remote_diff or []
        adds = [bool(side) and all(part.op == "addrange" for part in side) for side in sides]
        ids = [{cell.get("id") for cell in side[0].valuelist} for side in sides] if all(adds) else []
        if not (decision.conflict and decision.common_path == ("cells",) and any(adds)):
            kept.append(decision)
        elif not (all(adds) and ids[0].isdisjoint(ids[1])):  # the same new cell; or a change, and the result has both
            decision.conflict = decision.action == "custom"
            kept.append(decision)
        elif (place := sides[0][0].key) not in joined:
            joined[place] = sides
            decision.update(action="local_then_remote", conflict=False, custom_diff=None)
            kept.append(decision)
        else:  # nbdime makes one decision of each pair of similar cells; together they would stand interleaved
            for side, more in zip(joined[place], sides, strict=True):
                side[0].valuelist.extend(more[0].valuelist)
    return kept


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
