"""What can go wrong, tried in numbers: `make chaos` (an hour and more), `make chaos N=10` (at most so many of a kind).

Kills at every change of the disk, disks that are full, several processes at once, bad inputs. The table says how many
were tried and how many held: nothing lost, nothing wrong in silence, no hang, no trace as the last word, nothing left
running.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

MOUNTING = "CHAOS_MAY_MOUNT"  # in the environment, once we are where small disks may be mounted
sys.path.insert(0, str(Path(__file__).parents[1]))


def main(most: int | None) -> int:
    """Try all, at most `most` of each kind, and print the table; returns whether anything did not hold."""
    import parts
    from inputs import bad_inputs
    from jobs import make_ground

    kinds = (parts.kills_in_a_build, parts.kills_in_a_training, parts.full_disks, parts.rounds_at_once, bad_inputs)
    rows, failed, ground = [], [], make_ground(Path(tempfile.mkdtemp()))
    for kind in kinds:
        name, tried, held, begin = kind.__name__.replace("_", " "), 0, 0, time.monotonic()
        for what, wrong in kind(ground, Path(tempfile.mkdtemp()), most):
            tried, held = tried + 1, held + (not wrong)
            print(f"{name} {tried}, {what}: {wrong or 'held'}", flush=True)
            failed += [f"{name}, {what}: {wrong}"] * bool(wrong)
        rows.append(f"| {name} | {tried} | {held} | {(time.monotonic() - begin) / 60:.0f} min |")
    print("\n| | tried | held | took |\n| --- | --- | --- | --- |", *rows, "\nDid not hold:", sep="\n")
    print(*failed or ["nothing"], sep="\n")
    return bool(failed)


if __name__ == "__main__":
    if MOUNTING not in os.environ and os.system("unshare -rm true 2>/dev/null") == 0:
        os.execvpe("unshare", ["unshare", "-rm", sys.executable, *sys.argv], os.environ | {MOUNTING: "1"})
    with tempfile.TemporaryDirectory(prefix="surya-course-chaos-") as folder:
        tempfile.tempdir = folder
        os.environ.update(SURYA_SHARED=f"{folder}/shared", XDG_CACHE_HOME=f"{folder}/cache", NETRC=f"{folder}/netrc")
        os.environ.update(HF_HUB_OFFLINE="1", MPLBACKEND="Agg", OMP_NUM_THREADS="1", TMPDIR=folder)
        sys.exit(main(int(sys.argv[1]) if sys.argv[1:] else None))
