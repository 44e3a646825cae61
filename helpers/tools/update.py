"""Bring what the template has published into your branch: `make update`.

It fetches, says what is new, and merges. Where it cannot, it changes nothing and says in a sentence what to do first.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]

NO_CLONE = """\
This folder is no git clone (a downloaded ZIP?), so it cannot be updated. Clone the template, and copy your my_ files
and config.local.yaml into that clone."""
NO_GIT = """\
There is no git on this machine, or not on its PATH, so nothing can be updated. Install it; on a hub, ask for it."""
NO_REMOTE = """\
This clone has no remote called {remote}, so it does not know where the template is. It has: {known}.
If the template is one of these, name it (make update FROM=...). Else tell git the address that you cloned from:
  git remote add {remote} ADDRESS && {again}"""
NO_NETWORK = """\
Could not reach the template ({remote}, {address}); nothing was changed.
Are you online, and may you read it? Git says:
{words}"""
NO_MAIN = """\
The remote {remote} has no branch `main` that this clone fetches. If it is the right remote:
  git remote set-branches --add {remote} main && {again}"""
SHALLOW = """\
This clone is shallow: it lacks the older history, by which git tells your changes from the template's.
Fetching that, too ..."""
UNRELATED = """\
{branch} and {news} share no history (made by "Use this template", or from a ZIP?), so that git cannot tell your
changes from the template's. Nothing was merged. Clone the template again, and copy your my_ files and config.local.yaml
into that clone."""
ON_MAIN = """\
You are on main. Keep your work on a branch of its own, then main stays the template's:
  git switch -c my-task && {again}"""
ON_MAIN_WITH_COMMITS = """\
You are on main, and it has commits of your own. Keep them on a branch, and put main back to the template's:
  git switch -c my-task && git branch -f main {remote}/main && {again}"""
DETACHED = """\
You are on no branch (git calls this a detached HEAD): what you commit here is easily lost. Give it a branch:
  git switch -c my-task && {again}"""
MAIN_HAS_COMMITS = """\
Note: your own main has commits that the template does not have:
{commits}
So `git merge {remote} main` would merge two branches at once, and stop at the first conflict; `make update` merges only
the template's. Put main back to the template's; {keeper} these commits:
  {keep}git branch -f main {remote}/main"""
TWO_AT_ONCE = """\
A merge of several branches at once was begun here, and stopped: most likely your own main has commits, so that
`git merge origin main` meant two branches. Do not finish it, the second one would be missing. Go back, and come again:
  git merge --abort
  {again}"""
IN_THE_WAY = """\
Changed by you, not committed yet, and in the way of the merge:
{files}
Nothing was merged. Either commit:
  git commit -am 'My work so far' && {again}
or put these changes aside, and take them back afterwards:
  git stash push -- {arguments}
  {again} && git stash pop"""
SAME_NAME = """\
The template brings new files that have the names of files of yours, which git does not know yet:
{files}
Nothing was merged. Rename yours; the template never has names that begin with my_:
  mv {first} {renamed} && {again}"""
MERGED = """\
Merged into {branch}. To go back to before: git reset --keep {before}"""
RELOAD = """\
Notebooks that are open in JupyterLab: File > Reload Notebook from Disk, before you save them."""
OUTPUTS = """\
A merge writes notebooks without outputs; your executed {name} is kept as {copy}."""
CONFLICT = """\
You and the template changed the same lines of:
{files}
Open each one; a notebook opens in JupyterLab as always. Both versions stand in it: yours between <<<<<<< and =======,
the template's between ======= and >>>>>>>. Keep what you want, delete the marks, save. Then:
  git add {arguments} && git commit --no-edit
To take one version of a file as a whole, yours or the template's, before that `git add`:
  git checkout --ours FILE     or     git checkout --theirs FILE
To go back to before the merge, as if nothing had happened:
  git merge --abort"""
TO_FINISH = """\
No conflict is left. Finish the merge:
  git commit --no-edit
Or go back to before it, as if nothing had happened:
  git merge --abort"""


class Refusal(Exception):
    """Why nothing was merged, or why the merge waits, and what to do; the text is ready to print."""


def main(argv: Sequence[str] | None = None) -> int:
    """Update from the remote named on the command line, else from `origin`; returns the exit code."""
    remote = next(iter(sys.argv[1:] if argv is None else argv), "origin")
    try:
        update(remote)
    except Refusal as reason:
        print(reason)
        return 1
    return 0


def update(remote: str) -> None:
    """Fetch `remote` and merge its branch `main` into the branch you are on; Refusal says why not, or what is left."""
    again = "make update" + (f" FROM={shlex.quote(remote)}" if remote != "origin" else "")
    branch, news = own_branch(remote, again), f"{remote}/main"
    fetch(remote)
    if not exists(f"refs/remotes/{news}"):
        raise Refusal(NO_MAIN.format(remote=remote, again=again))
    if not works("symbolic-ref", "-q", f"refs/remotes/{remote}/HEAD"):
        git("remote", "set-head", remote, "main")  # the `origin` in `git merge origin main`
    tell_about_main(remote, branch)
    if works("merge-base", "--is-ancestor", news, "HEAD"):
        print(f"Nothing new: {branch} already holds everything that {news} has.")
        return
    if not works("merge-base", news, "HEAD"):
        raise Refusal(UNRELATED.format(branch=branch, news=news))
    tell_news(news)
    touched = names("diff", "--name-only", "--no-renames", f"HEAD...{news}")
    refuse_what_is_in_the_way(set(touched), again)
    keep_outputs(touched)
    merge(news, branch, touched)


def git(*words: str) -> str:
    """What git prints; a failure is a Refusal that quotes git."""
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise Refusal(
            f"`git {shlex.join(words)}` failed; nothing was merged. Git says:\n{indent([done.stderr.strip()])}"
        )
    return done.stdout.rstrip("\n")


def works(*words: str) -> bool:
    """Whether git answers yes."""
    return not subprocess.run(["git", *words], cwd=ROOT, capture_output=True).returncode


def exists(name: str) -> bool:
    """Whether git knows a branch or commit of this name."""
    return works("rev-parse", "--quiet", "--verify", name)


def names(*words: str) -> list[str]:
    """The file names that git lists."""
    return [name for name in git(*words, "-z").split("\0") if name]


def own_branch(remote: str, again: str) -> str:
    """The branch to merge into; Refusal if there is none of your own, a merge in progress, or no template to ask."""
    if not (ROOT / ".git").exists():
        raise Refusal(NO_CLONE)
    if not shutil.which("git"):
        raise Refusal(NO_GIT)
    if exists("MERGE_HEAD"):
        several = len((ROOT / git("rev-parse", "--git-path", "MERGE_HEAD")).read_text().split()) > 1
        finish = "A merge was begun here, and waits for you.\n" + how_to_finish()
        raise Refusal(TWO_AT_ONCE.format(again=again) if several else finish)
    if remote not in (remotes := git("remote").split()):
        raise Refusal(NO_REMOTE.format(remote=remote, known=", ".join(remotes) or "none", again=again))
    branch = git("branch", "--show-current")
    if branch == "main":
        raise Refusal((ON_MAIN_WITH_COMMITS if own_commits(remote) else ON_MAIN).format(remote=remote, again=again))
    if not branch:
        raise Refusal(DETACHED.format(again=again))
    return branch


def own_commits(remote: str) -> list[str]:
    """The commits of the local `main` that the template does not have, newest first, one line each."""
    theirs, mine = f"refs/remotes/{remote}/main", "refs/heads/main"
    return git("log", "--format=%h %s", f"{theirs}..{mine}").splitlines() if exists(theirs) and exists(mine) else []


def fetch(remote: str) -> None:
    """Ask the template for news; a shallow clone gets the rest of its history, too."""
    deeper = ["--unshallow"] if git("rev-parse", "--is-shallow-repository") == "true" else []
    if deeper:
        print(SHALLOW, flush=True)
    words = ["git", "fetch", "--quiet", *deeper, remote]
    done = subprocess.run(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        address = re.sub("//[^/@]*@", "//", git("remote", "get-url", remote))  # a token in it is nobody's business
        raise Refusal(NO_NETWORK.format(remote=remote, address=address, words=indent([done.stderr.strip()])))


def tell_about_main(remote: str, branch: str) -> None:
    """A local `main` that has left the template's makes `git merge origin main` a merge of two branches at once."""
    if commits := own_commits(remote):
        safe = works("merge-base", "--is-ancestor", "refs/heads/main", "HEAD")
        keeper, keep = (f"{branch} has", "") if safe else ("a new branch my-main keeps", "git branch my-main main && ")
        print(MAIN_HAS_COMMITS.format(commits=indent(commits), remote=remote, keeper=keeper, keep=keep))


def tell_news(news: str) -> None:
    """One line a commit, and the defaults of config.yaml that changed."""
    print(f"New in {news}:\n" + git("log", "--format=  %s (%an, %as)", "--no-merges", f"HEAD..{news}"))
    before, after = (settings(f"{commit}:config.yaml") for commit in (git("merge-base", "HEAD", news), news))
    local = ROOT / "config.local.yaml"
    yours = dict(leaves(local.read_text(encoding="utf-8"))) if local.exists() else {}
    changed = [key for key in before | after if before.get(key) != after.get(key)]
    if changed:
        print("Changed in config.yaml, old → new default:")
    for key in changed:
        hint = f"  (your config.local.yaml goes on to say {yours[key]})" if key in yours else ""
        if key in yours and key not in after:
            hint = "  (take it out of your config.local.yaml)"
        print(f"  {key}: {before.get(key, 'not there')} → {after.get(key, 'removed')}{hint}")


def settings(blob: str) -> dict[str, str]:
    """{"training.lr": "1e-3", ...} of a YAML file in git; empty if it is not there."""
    return dict(leaves(git("show", blob))) if works("cat-file", "-e", blob) else {}


def leaves(text: str) -> Iterator[tuple[str, str]]:
    """Dotted key and value of every setting in a YAML text, as they are written there; none if it is not valid."""

    def walk(tree: object, prefix: str) -> Iterator[tuple[str, str]]:
        if isinstance(tree, dict):
            for key, value in tree.items():
                yield from walk(value, f"{prefix}.{key}" if prefix else key)
        else:
            yield prefix, f"[{', '.join(map(str, tree))}]" if isinstance(tree, list) else str(tree) or '""'

    try:
        yield from walk(yaml.load(text, yaml.BaseLoader) or {}, "")  # noqa: S506 - reads strings only
    except yaml.YAMLError:
        return


def refuse_what_is_in_the_way(touched: set[str], again: str) -> None:
    """Git does not merge over files that are not committed: Refusal names those, and no others, with the ways out."""
    changed, staged = set(names("diff", "--name-only")), set(names("diff", "--name-only", "--cached"))
    executed = set(names("diff-files", "--name-only")) - changed
    if executed:  # notebooks with new outputs count as changed until git has looked at them through its filter
        git("add", "--", *sorted(executed))
    if waiting := sorted(changed & touched | staged):
        raise Refusal(IN_THE_WAY.format(files=indent(waiting), arguments=shlex.join(waiting), again=again))
    if new := sorted(touched & set(names("ls-files", "--others", "--exclude-standard"))):
        path = Path(new[0])
        first, renamed = (shlex.quote(str(p)) for p in (path, path.with_name(f"my_{path.name}")))
        raise Refusal(SAME_NAME.format(files=indent(new), first=first, renamed=renamed, again=again))


def keep_outputs(touched: Iterable[str]) -> None:
    """Copy the executed notebooks that the merge will write anew, into runs/."""
    for path in (ROOT / name for name in touched if name.endswith(".ipynb")):
        try:
            executed = any(cell.get("outputs") for cell in json.loads(path.read_text(encoding="utf-8"))["cells"])
        except (OSError, ValueError, KeyError):  # gone, or no notebook: nothing to keep
            continue
        if executed:
            copy = ROOT / "runs" / f"before-update-{git('rev-parse', '--short', 'HEAD')}" / path.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
            print(OUTPUTS.format(name=path.name, copy=copy.relative_to(ROOT)))


def merge(news: str, branch: str, touched: Iterable[str]) -> None:
    """The merge itself, of the template's branch alone: `git merge origin main` without your own `main`."""
    before = git("rev-parse", "--short", "HEAD")
    done = subprocess.run(["git", "merge", "--quiet", "--no-edit", news], cwd=ROOT, capture_output=True, text=True)
    if exists("MERGE_HEAD"):
        raise Refusal(how_to_finish())
    if done.returncode:
        said = indent([done.stdout.strip(), done.stderr.strip()])
        raise Refusal(f"Git did not merge, and nothing was changed. It says:\n{said}")
    print(MERGED.format(branch=branch, before=before))
    if any(name.endswith(".ipynb") for name in touched):
        print(RELOAD)


def how_to_finish() -> str:
    """What is in conflict in the merge at hand, how to finish it, and how to give it up."""
    files = names("diff", "--name-only", "--diff-filter=U")
    if not files:
        return TO_FINISH
    states = {line[3:]: line[:2] for line in names("status", "--porcelain", "--untracked-files=no")}
    why = {
        "UD": "  (you changed it, the template deleted it; to agree: git rm {0})",
        "DU": "  (you deleted it, the template changed it; to leave it deleted: git rm {0})",
    }
    listed = indent(name + why.get(states.get(name, ""), "").format(shlex.quote(name)) for name in files)
    return CONFLICT.format(files=listed, arguments=shlex.join(files))


def indent(lines: Iterable[str]) -> str:
    """Lines, or texts of several lines, two blanks to the right."""
    return "\n".join(f"  {line}" for text in lines for line in text.splitlines())


if __name__ == "__main__":
    sys.exit(main())
