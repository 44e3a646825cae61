"""Merge what the template has published into your branch: `make update`.

It is `git fetch` and `git merge`; what it adds is what to do when these stop.
"""

import fcntl
import os
import re
import shlex
import shutil
import subprocess
import sys

from helpers.tools.command import ROOT, Refusal, run

CONFLICT = """\
You and the template changed the same lines of:
{files}
Each holds both versions: yours between <<<<<<< and =======, the template's between ======= and >>>>>>>. Keep what you
want, delete the marks and save (or `git rm FILE`, if you want nothing of it); notebooks/hub.ipynb shows how. Then:
  git add {arguments} && git commit --no-edit
Or go back to before the merge, as if nothing had happened:
  git merge --abort"""


def main(remote: str) -> None:
    """Fetch `remote` and merge its branch `main` into yours; Refusal says why not, or which conflicts are left."""
    if not (ROOT / ".git").exists():
        raise Refusal("This folder is no git clone (a downloaded ZIP?). Clone the template, and copy your files there.")
    fcntl.flock(os.open(ROOT / ".git", os.O_RDONLY), fcntl.LOCK_EX)  # a second call waits until this process ends
    stop_at_an_unfinished_merge()
    if not git("branch", "--show-current"):
        raise Refusal("You are on no branch (a detached HEAD). Give your work one: git switch -c my-task")
    deepen = ["--unshallow"] if git("rev-parse", "--is-shallow-repository") == "true" else []
    git("fetch", "--quiet", *deepen, remote)
    news, before = f"{remote}/main", git("rev-parse", "--short", "HEAD")
    if not git("rev-list", f"HEAD..{news}"):
        print(f"Nothing new: your branch holds everything that {news} has.")
        return
    # what its maintainers have written for users since you last updated
    added = re.findall(r"^\+(?!\+\+)(.+)", git("diff", "--unified=0", f"HEAD...{news}", "--", "NEWS.md"), re.MULTILINE)
    print(f"New in {news}:", *added or ["Changes that its NEWS.md does not mention."], sep="\n")
    spare_executed_notebooks(news, before)
    try:
        # the template's branch alone: `git merge origin main` would also merge commits of your own main
        git("merge", "--quiet", "--no-edit", news)
    except Refusal:
        stop_at_an_unfinished_merge()
        raise
    print(f"Merged. To go back to before: git reset --keep {before}")
    print("Notebooks that are open in JupyterLab: File > Reload Notebook from Disk, before you save them.")


def git(*words: str) -> str:
    """What git prints; a failure is a Refusal that quotes git, without the passwords and tokens of addresses."""
    command = ["git", "-c", "core.quotePath=false", *words]  # names as they are, in any script
    english = {**os.environ, "LC_ALL": "C"}  # as advice follows from its words
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", env=english)
    if done.returncode == 0:
        return done.stdout.strip("\n")
    said = re.sub(r"(\w+://)(?:[^/\s]*@)?([^\s?']*)(?:\?[^\s']*)?", r"\1\2", (done.stderr or done.stdout).strip())
    if ".lock'" in said:
        advice = "Another git command is at work in this clone. Wait for it, then call `make update` again."
    elif "overwritten by merge" in said:
        advice = "Commit these files first (git commit -am 'My work so far'); rename those that git does not know yet."
    elif "no merge base" in said:
        advice = 'The two share no history ("Use this template"?). Clone the template, and copy your files there.'
    elif words[0] == "fetch":
        advice = "Are you online, and may you read the template? Is it called FROM=... in this list: git remote -v"
    else:
        advice = "Your files are as they were."
    raise Refusal(f"`git {words[0]}` failed, and nothing was merged. Git says:\n{said}\n{advice}")


def stop_at_an_unfinished_merge() -> None:
    """Refusal with the ways to end the merge at hand, if there is one."""
    heads = ROOT / git("rev-parse", "--git-path", "MERGE_HEAD")
    if not heads.exists():
        return
    if len(heads.read_text().split()) > 1:
        # `git merge origin main`, where your own main has commits; finished by hand it would lack the second branch
        raise Refusal("A merge of several branches stopped here. Start again:\n  git merge --abort\n  make update")
    files = git("diff", "--name-only", "--diff-filter=U").splitlines()
    if not files:
        raise Refusal("A merge waits to be finished:  git commit --no-edit\nor given up:  git merge --abort")
    raise Refusal(CONFLICT.format(files="\n".join(f"  {name}" for name in files), arguments=shlex.join(files)))


def spare_executed_notebooks(news: str, before: str) -> None:
    """Notebooks that were only executed are not in the way of a merge, and their outputs are kept in runs/.

    Git takes them for changed until it has looked at them through its filter, and writes them without outputs.
    """
    touched = git("diff", "--name-only", "--no-renames", f"HEAD...{news}", "--", "*.ipynb").splitlines()
    changed = git("diff", "--name-only").splitlines()
    for name in set(touched) & set(git("ls-files").splitlines()) - set(changed):
        path = ROOT / name
        if '"output_type"' in path.read_text(encoding="utf-8"):
            copy = ROOT / "runs" / f"before-update-{before}" / path.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
            git("add", "--", name)
            print(f"Your executed {name} is kept as {copy.relative_to(ROOT)}; a merge writes it without outputs.")


if __name__ == "__main__":
    run(lambda: main(*sys.argv[1:]))
