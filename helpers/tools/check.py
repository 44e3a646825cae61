"""What this machine has of what a run needs, on one screen, and the command that mends what lacks: `make check`."""

import argparse
import shlex
import sys
import urllib.error
import urllib.request

import torch
from huggingface_hub import constants
from jupyter_client.kernelspec import find_kernel_specs, get_kernel_spec

from helpers.config import load_config
from helpers.data.frames import prepare_store
from helpers.shared import GB, find_weights, free_space, is_writable, memory
from helpers.tools.command import ROOT, read_choices, run
from helpers.training.devices import choose_device, free_memory
from helpers.training.tracking import wandb_mode


def main() -> int:
    """Look, and download neither weights nor frames; 1 if a run of the profile cannot work here."""
    parser = argparse.ArgumentParser(prog="python -m helpers.tools.check", description=main.__doc__)
    asked = read_choices(parser)
    cfg = load_config(ROOT / "config.yaml", **asked.choices)  # prints the shared folder, why, and who may write
    words = [f"{name.upper()}={asked.choices[name]}" for name in ("task", "profile") if asked.choices[name]]
    words += [f"P={' '.join(asked.parameters)}"] if asked.choices["parameters"] else []
    cache, problems = shlex.join(["make", "cache", *words]), []

    def say(what: str, state: object, mend: str = "", server: str = "") -> None:
        """A line, the command that mends it, and the server which that command needs."""
        print(f"{what:8} {state}")
        if mend:
            print(f"{'':8} -> {mend}")
        try:
            if server:
                urllib.request.urlopen(server, timeout=5)
        except urllib.error.HTTPError:  # no is an answer, too
            pass
        except OSError:
            problems.append(f"{what}: {server} does not answer")

    device, (free, total) = choose_device(cfg.training.device), memory()
    say("Python", f"{sys.version.split()[0]} in {sys.prefix}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    say("memory", f"{free / GB:.1f} of {total / GB:.1f} GB free")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    say("GPU", f"{name}, {free_memory(device) / GB:.1f} GB free" if name else "none; the CPU computes")
    say("disk", f"{free_space(cfg.runs_folder) / GB:.1f} GB free in {cfg.runs_folder}")

    hub, on_hub = constants.ENDPOINT, "hf://" in str(cfg.labels.path)
    bucket = f"https://{cfg.data.archive.removeprefix('s3://').partition('/')[0]}.s3.amazonaws.com"
    server = (cfg.data.endpoint_url or bucket) if cfg.data.archive.startswith("s3://") else ""
    try:
        say("weights", find_weights(cfg.model.weights, cfg.shared) or "none: random ones")
    except FileNotFoundError as error:
        if cfg.model.weights.startswith("hf://"):
            say("weights", f"{cfg.model.weights} is not here", cache, hub)
        else:
            say("weights", error)
            problems.append("weights: see above")
    try:
        if cfg.synthetic.folder and not cfg.shared.to_read(cfg.synthetic.folder).exists():
            say("frames", "a synthetic Sun, to be drawn in two minutes", cache)
        else:
            report = prepare_store(cfg, plan_only=True)
            say("labels", cfg.labels.path)
            there, to_build = report.needs.splitlines()[:2]
            lacking = report.already < len(report.samples.frames)
            say("frames", to_build if lacking else there, cache if lacking else "", server if lacking else "")
            if report.to_read_gb > cfg.data.ask_above_gb:
                problems.append(f"frames: more to read than data.ask_above_gb, {cfg.data.ask_above_gb:g} GB")
            if report.to_store_gb + cfg.paths.reserve_gb > free_space(report.store) / GB:
                problems.append(f"frames: no room for them where {report.store} is")
            if lacking and not (is_writable(report.store) or cfg.data.private_cache):
                problems.append("frames: that folder is read-only for you; whoever may write there adds them")
    except (OSError, ValueError) as error:
        say("labels", str(error).splitlines()[0][:200], shlex.join(["make", "plan", *words]), hub if on_hub else "")
        problems += [] if on_hub and isinstance(error, FileNotFoundError) else ["labels: see above"]
    mode = wandb_mode(cfg)
    say("W&B", mode, "wandb login" if mode == "offline" else "")
    registered = "surya-course" in find_kernel_specs() and get_kernel_spec("surya-course").argv[0] == sys.executable
    say("kernel", "Surya course" if registered else "not registered", "" if registered else "make kernel")
    verdict = "cannot run here" if problems else "ready"
    print(f"\nprofile {cfg.profile}, task {cfg.task}: {verdict}", *problems, sep="\n")
    return int(bool(problems))


if __name__ == "__main__":
    run(main)
