"""Kills at every change of the disk, full disks, several at once: what was tried, and what was wrong with it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from children import Changes, Ended, at_once
from frame_files import HOURS, build, files, serving, write_index
from jobs import Job, jobs, small
from test_git_workflow import LESSON, PERSON, PLAIN, configure, git, make_template, publish

from helpers.data.archive import Archive
from helpers.data.synthetic import ensure_synthetic
from helpers.training.tracking import claim_run

Tried = Iterator[tuple[str, str]]  # what, and what was wrong; "" where it held


def some(many: int, most: int | None) -> list[int]:
    """At most `most` of the numbers from 1 to `many`, evenly spaced."""
    most = min(many, most or many)
    return [1 + place * many // most for place in range(most)]


def undisturbed(job: Job, folder: Path) -> object:
    """What a job leaves when nothing happens."""
    folder.mkdir(exist_ok=True)
    (ended,) = at_once(lambda: job.work(folder))
    assert ended.code == 0, ended.said
    return job.left(folder)


# ---- kills
def kills_in_a_build(ground: Path, folder: Path, most: int | None) -> Tried:
    """A builder dies; the next one completes the store to the very same bytes."""
    return kills(jobs(ground)["store build"], folder, most)


def kills_in_a_training(ground: Path, folder: Path, most: int | None) -> Tried:
    """A training dies; the run that goes on ends with the very same bits."""
    return kills(jobs(ground)["training"], folder, most)


def kills(job: Job, folder: Path, most: int | None) -> Tried:
    """A job dies at one change of the disk, and is called again. Whatever others see meanwhile is whole."""

    def doomed(disk: Path, number: int) -> None:
        changes = Changes(disk, number)
        job.work(disk)
        print("changes:", changes.count)

    whole = undisturbed(job, folder / "whole")
    (counted,) = at_once(lambda: doomed(folder / "counted", 0))
    changes = int(counted.last.split()[-1])
    for number in some(changes, most):
        disk = folder / str(number)
        (killed,) = at_once(partial(doomed, disk, number))
        wrong = "" if killed.code == -9 else f"it was not killed: {killed}"
        seen = job.left(disk)
        whole_so_far = seen.items() <= whole.items() if isinstance(seen, dict) else seen in ([], whole)
        wrong = wrong or ("" if whole_so_far else "others see something that is not whole")
        (again,) = at_once(partial(job.work, disk))
        wrong = wrong or again.fault or ("" if job.left(disk) == whole else "it ends with other bits")
        yield f"change {number} of {changes}", wrong


# ---- full disks
def mount(folder: Path, size: int) -> None:
    """A new and empty disk of so many bytes at `folder`."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["umount", folder], capture_output=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={max(size, 4096)}", "tmpfs", folder], check=True)


def full_disks(ground: Path, folder: Path, most: int | None) -> Tried:
    """A disk that is too small for a long command: a sentence at the end, and once there is room it goes on."""
    for name, job in jobs(ground).items() if "CHAOS_MAY_MOUNT" in os.environ else ():
        mount(disk := folder / "disk", 2**30)
        whole = undisturbed(job, disk)
        used = sum(512 * path.lstat().st_blocks for path in disk.rglob("*"))
        for level in some(20, most):
            mount(disk, int(used * (level - 0.5) / 20))
            (ended,) = at_once(partial(job.work, disk))
            wrong = ended.fault or ("" if ended.code else "it says that all is well")
            if not any(word in ended.last for word in ("disk", "room", "space")):
                wrong = wrong or f"it does not say why: {ended.last}"
            subprocess.run(["mount", "-o", "remount,size=1g", disk], check=True)
            (again,) = at_once(partial(job.work, disk))
            wrong = wrong or again.fault or ("" if job.left(disk) == whole else f"another result: {again.last}")
            yield f"{name} with {5 * level - 2.5:.1f}% of the room", wrong
        subprocess.run(["umount", disk], check=True)


# ---- two and three at once
def rounds_at_once(ground: Path, folder: Path, most: int | None) -> Tried:
    """Two or three processes do the same at the same time, and each gets what it would get alone."""
    own = {"builds from S3": builds_from_s3, "names": run_names, "different Suns": different_suns, "updates": updates}
    kinds = own | {name: partial(same_jobs, job=job) for name, job in jobs(ground).items()}
    left = [name for name in kinds for _ in range(12)]
    for number in some(len(left), most):
        (place := folder / str(number)).mkdir()
        count = 2 + number % 2
        yield f"{count} at once: {left[number - 1]}", kinds[left[number - 1]](ground, place, count)


def wrong_with(ended: list[Ended], result_is_right: bool) -> str:
    """The first fault of processes that leave what is right; all should succeed, or find that another one has."""
    failed = [one for one in ended if one.code and "nothing is overwritten" not in one.last]
    faults = [one.fault or f"it ended with: {one.last}" for one in ended if one.fault or one in failed]
    return [*faults, "" if result_is_right else "another result"][0]


def same_jobs(ground: Path, place: Path, count: int, job: Job) -> str:
    whole = undisturbed(job, place / "alone")
    (together := place / "together").mkdir()
    ended = at_once(*[lambda: job.work(together)] * count)
    hidden = [path.name for path in together.iterdir() if path.name.startswith(".")]
    return wrong_with(ended, job.left(together) == whole and not hidden)


def builds_from_s3(ground: Path, place: Path, count: int) -> str:
    write_index(place / "bucket", HOURS)
    build(place / "bucket", "whole.zarr")
    with serving(place / "bucket") as (address, _):
        archive = Archive("s3://sun", endpoint_url=address)
        ended = at_once(*[lambda: build(place, archive=archive)] * count)
    same = files(place / "store.zarr") == files(place / "bucket" / "whole.zarr")
    return wrong_with(ended, same and {path.name for path in place.iterdir()} == {"bucket", "store.zarr"})


def run_names(ground: Path, place: Path, count: int) -> str:
    ended = at_once(*[lambda: [print(claim_run(place, "run")) for _ in range(20)] and None] * count)
    names = [line for one in ended for line in one.said.split()]
    return wrong_with(ended, len(set(names)) == len(names) == 20 * count)


def different_suns(ground: Path, place: Path, count: int) -> str:
    """The first one is whole, and the others are refused."""
    own = [{"synthetic.visits": 4, "synthetic.seed": seed} for seed in range(count)]
    ended = at_once(*[lambda o=o: ensure_synthetic(small(place / "sun", place, **o)) and None for o in own])
    drawn = [one for one in ended if not one.code]
    said = all("another synthetic Sun" in one.said for one in ended if one.code)
    frames = len([*(place / "sun").glob("2014/*/*.nc")])
    return wrong_with(drawn, len(drawn) == 1 and said and 10 < frames <= 12 and len([*place.iterdir()]) == 1)


def updates(ground: Path, place: Path, count: int) -> str:
    """The template's news are merged; who comes second waits, and is told that there is nothing new."""
    template, clone = make_template(place / "template"), place / "clone"
    git(place, "clone", "-q", "template", "clone")
    configure(clone)
    git(clone, "switch", "-qc", "mine")
    (clone / "mine.txt").write_text("mine")
    publish(clone, message="Mine")
    publish(template, "lr = 2")
    words, person = [sys.executable, "-m", "helpers.tools.update", "origin"], os.environ | PERSON | PLAIN
    person |= {"PYTHONPATH": ""}  # the clone's own helpers
    ended = at_once(*[lambda: subprocess.run(words, cwd=clone, env=person).returncode] * count)
    merged = "lr = 2" in (clone / LESSON).read_text() and not git(clone, "status", "--porcelain")
    return wrong_with(ended, merged)
