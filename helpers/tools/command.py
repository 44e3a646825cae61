"""What the commands share: where the course lies, which notebooks there are, and how a command ends."""

import argparse
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from helpers.config import parse_parameters

ROOT = Path(__file__).resolve().parents[2]


class Refusal(Exception):
    """Why nothing was done, and what to do; the text is ready to print."""


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call a command and end the process with what it returns, 130 after Ctrl-C, or 1 after an error.

    An error that the course's own code raised is a sentence. Any other one comes with a log of its traceback.
    """
    code: int | None = 1
    sys.unraisablehook = _interrupt_again
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # who reads, such as `head`, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt as interrupt:
        code = 130
        print(str(interrupt) or "Interrupted.")
    except Exception as error:
        origin = traceback.extract_tb(error.__traceback__)[-1]
        file = Path(origin.filename)
        ours = file.is_relative_to(ROOT / "helpers") and not file.name.startswith("my_")
        # an error of a class of ours may come from another process
        if ours and origin.line.startswith("raise ") or type(error).__module__.startswith("helpers."):
            print(error)
        else:
            with tempfile.NamedTemporaryFile("w", prefix="surya-course-", suffix=".log", delete=False) as log:
                traceback.print_exc(file=log)
            print(f"{type(error).__name__}: {error}\nWhere it happened stands in {log.name}")
    sys.exit(code)


def _interrupt_again(unraised: Any) -> None:
    """Python drops a Ctrl-C in the middle of a callback, where nothing can be raised: send it again, a little later."""
    if unraised.exc_type is KeyboardInterrupt:
        threading.Timer(0.05, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(unraised)


def read_choices(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line; `choices` of the result holds the arguments profile, task, parameters of `load_config`."""
    parser.add_argument("--task", help="an entry under `tasks` in config.yaml")
    parser.add_argument("--profile", help="an entry under `profiles`: tiny, surya or surya_4k")
    parser.add_argument("--parameters", nargs="*", default=[], metavar="KEY=VALUE", help="other values of the config")
    asked = parser.parse_args(argv)
    parameters = parse_parameters(asked.parameters)
    asked.choices = {"profile": asked.profile, "task": asked.task, "parameters": parameters}
    return asked


def find_notebook(name: str, folder: Path) -> Path:
    """The notebook called `name`, with or without folder and ending; Refusal lists what there is."""
    notebooks = {path.stem: path for path in sorted(folder.glob("*.ipynb"))}
    stem = Path(name).name.removesuffix(".ipynb")
    if stem not in notebooks:
        problem = f"There is no notebook '{name}'." if name else "Which notebook? For example: NB=finetune."
        raise Refusal(f"{problem} There is: {', '.join(notebooks)}")
    return notebooks[stem]
