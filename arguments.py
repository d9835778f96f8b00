"""The command line of the demos."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import re
import shlex
import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backbone import files, wandb_internals


@dataclasses.dataclass(frozen=True)
class Args:
    """The command line of a demo. `mode` is resolved and `dir` absolute."""

    steps: int
    training_workers: int
    inference_workers: int
    step_seconds: float
    seed: int
    mode: str
    entity: str | None
    dir: Path
    experiment: str
    address: str | None
    finish_timeout: float
    one_run: bool = False

    @property
    def init(self) -> dict[str, Any]:
        """What every run of a demo passes on to `wandb.init`, whatever the strategy."""
        config = {key: getattr(self, key) for key in ("experiment", "seed", "steps", "step_seconds")}
        settings = {"finish_timeout": self.finish_timeout}
        return dict(mode=self.mode, entity=self.entity, dir=self.dir, resume="allow", config=config, settings=settings)


def parse_args(doc: str, argv: Sequence[str] | None = None) -> Args:
    """Parses a demo's command line; `doc`, its docstring, is the help text.

    Exits with status 2 and one line on stderr for anything that could not work, before Ray is started.
    """
    env, now = os.environ.get, datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]
    form = dict(formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS)  # errors are one line
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False, **form)
    parser.add_argument("--steps", type=int, default=20, help="of training and of inference (%(default)s)")
    parser.add_argument("--training-workers", type=int, default=2, metavar="N", help="(%(default)s)")
    parser.add_argument("--inference-workers", type=int, default=2, metavar="N", help="(%(default)s)")
    parser.add_argument("--step-seconds", type=float, default=0.05, metavar="S", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="(%(default)s)")
    parser.add_argument("--mode", choices=("online", "offline", "disabled"), help="(WANDB_MODE, else by login)")
    parser.add_argument("--entity", help="W&B user or team (your default one)")
    parser.add_argument("--dir", type=Path, default=env("WANDB_DIR") or ".", help="runs go to DIR/wandb (this folder)")
    parser.add_argument("--experiment", default=now, metavar="ID", help="in run names (the clock)")
    parser.add_argument("--address", default=env("RAY_ADDRESS") or None, help="Ray cluster (start one here)")
    timeout = env("WANDB_FINISH_TIMEOUT") or "60"
    parser.add_argument("--finish-timeout", type=float, default=timeout, metavar="S", help="upload (%(default)s)")
    if "--one-run" in doc:
        parser.add_argument("--one-run", action="store_true", help="both pipelines in one run")
    args = parser.parse_args(argv)

    least = dict(steps=1, training_workers=1, inference_workers=1, step_seconds=0, seed=0, finish_timeout=1)
    for name, minimum in least.items():
        if not minimum <= getattr(args, name) <= 2**32:
            parser.error(f"--{name.replace('_', '-')} must be a number from {minimum} to {2**32}")
    for name in ("entity", "experiment"):
        value = getattr(args, name)
        if value is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}", value):
            parser.error(f"--{name} {value!r} must be 1 to 60 letters, digits, '.', '_' or '-'")
    args.mode = _mode(args.mode, parser)
    args.address = _address(args.address, parser)
    args.dir = args.dir.expanduser().absolute()
    try:
        files.make_runs_folder(args.dir)
    except OSError as error:
        parser.error(f"--dir {error}")
    return Args(**vars(args))


def _mode(flag: str | None, parser: argparse.ArgumentParser) -> str:
    """The flag, else what the environment or `wandb offline` says, else by login."""
    mode = flag or os.environ.get("WANDB_MODE") or wandb_internals.mode_of_this_folder()
    if mode not in (None, "online", "offline", "disabled"):
        parser.error(f"the W&B mode is {mode!r}: use online, offline or disabled")
    if mode in ("offline", "disabled"):
        return mode
    try:
        login = wandb_internals.has_login()
    except ValueError as error:
        parser.error(f"the API key can't be right: {error}")
    if mode and not login:
        login_first = f"run `{wandb_command('login')}`, set WANDB_API_KEY or use --mode offline"
        parser.error(f"online mode needs an API key: {login_first}")
    if not login:
        hint = f"`{wandb_command('login')}` changes that"
        print(f"No W&B API key found, so the runs stay on this machine (offline). {hint}.")
    return "online" if login else "offline"


def _address(address: str | None, parser: argparse.ArgumentParser) -> str | None:
    """The address of a Ray that answers; None for one of our own."""
    if address in (None, "local", "auto"):
        return address if address == "auto" else None
    if address.startswith("ray://"):
        parser.error(f"--address {address}: no Ray Client here; use HOST:PORT on a node, or `ray job submit`")
    if "://" in address:
        parser.error(f"--address {address}: that is for `ray job submit --address`; here it is HOST:PORT of the GCS")
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, ValueError, OverflowError) as error:
        parser.error(f"--address {address}: no Ray cluster answers there ({error}); give HOST:PORT")
    return address


def shown(path: Path) -> str:
    """Relative if it is below the folder that the user is in."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def wandb_command(*words: str) -> str:
    """A `wandb` command that works when pasted into the shell that this program was started from."""
    script = str(Path(sys.executable).with_name("wandb"))
    command = ["wandb"] if shutil.which("wandb") == script else [script]
    if "UV" in os.environ:  # `uv run` puts it on the PATH of this program, not of the shell
        here = Path(__file__).parent
        command = ["uv", "run", *(["--project", shown(here)] if Path.cwd() != here else []), "wandb"]
    return shlex.join([*command, *words])
