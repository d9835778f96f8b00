"""The command line of the demos: what it means, and that a mistake ends with one line before anything is started."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from arguments import parse_args

import pytest
import wandb

DOC = "A demo.\n\n--one-run: both pipelines in one run."


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    """A user without an account, in a folder of their own; wandb looks at settings once per process."""
    wandb.teardown()  # takes WANDB_SERVICE along, which must not be put back afterwards
    for key in list(os.environ):
        if key.startswith("WANDB_") or key in ("RAY_ADDRESS", "NETRC"):
            monkeypatch.delenv(key)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield
    wandb.teardown()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--steps", "0"], "--steps"),
        (["--steps", "many"], "--steps"),
        (["--steps", str(2**33)], "--steps"),
        (["--step", "5"], "--step"),
        (["--step-seconds", "-1"], "--step-seconds"),
        (["--step-seconds", "nan"], "--step-seconds"),
        (["--training-workers", "0"], "--training-workers"),
        (["--inference-workers", "0"], "--inference-workers"),
        (["--seed", "-1"], "--seed"),
        (["--finish-timeout", "0"], "--finish-timeout"),
        (["--mode", "maybe"], "--mode"),
        (["--mode", "shared"], "--mode"),
        (["--experiment", "a/b"], "--experiment"),
        (["--experiment", ""], "--experiment"),
        (["--experiment", "x" * 200], "--experiment"),
        (["--entity", "a b"], "--entity"),
        (["--address", "127.0.0.1:1"], "--address"),
        (["--address", "nonsense"], "--address"),
        (["--address", "127.0.0.1:99999999"], "--address"),
        (["--address", "ray://127.0.0.1:10001"], "ray job submit"),
        (["--address", "http://127.0.0.1:8265"], "ray job submit"),
        (["--dir", "/proc/nowhere"], "--dir"),
        (["--one-run"], "--one-run"),
        (["--mode", "online"], "API key"),
    ],
)
def test_bad_arguments_end_with_one_line_and_status_2(arguments, named, capsys):
    with pytest.raises(SystemExit) as end:
        parse_args("A demo.", arguments)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert named in error


def test_a_file_in_the_way_of_the_folder_ends_with_one_line(tmp_path, capsys):
    Path("wandb").write_text("")
    with pytest.raises(SystemExit):
        parse_args("A demo.", [])
    assert "can't be written" in capsys.readouterr().err


def test_help_is_the_demo_s_docstring_and_every_flag(capsys):
    with pytest.raises(SystemExit) as end:
        parse_args(DOC, ["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert DOC in text
    flags = "steps training-workers inference-workers step-seconds seed mode entity dir experiment address one-run"
    assert all(f"--{flag}" in text for flag in [*flags.split(), "finish-timeout"])


def test_the_defaults(tmp_path):
    args = parse_args(DOC, [])
    assert (args.steps, args.training_workers, args.inference_workers, args.step_seconds) == (20, 2, 2, 0.05)
    assert (args.seed, args.mode, args.entity, args.dir, args.address) == (42, "offline", None, tmp_path, None)
    assert (args.finish_timeout, args.one_run) == (60, False)
    assert args.experiment[:3] == "202"  # the clock's


def test_runs_go_below_dir_which_is_made_and_absolute(tmp_path):
    for folder in ("runs", "~/at/home", str(tmp_path / "elsewhere")):
        args = parse_args(DOC, ["--dir", folder])
        assert args.dir == Path(folder).expanduser().absolute()
        assert list(args.dir.iterdir()) == [args.dir / "wandb"]
        assert list((args.dir / "wandb").iterdir()) == []


def test_what_every_run_is_given(tmp_path):
    args = parse_args(DOC, ["--experiment", "x", "--entity", "team", "--steps", "3", "--finish-timeout", "5"])
    assert args.init == dict(
        mode="offline",
        entity="team",
        dir=tmp_path,
        resume="allow",
        config=dict(experiment="x", seed=42, steps=3, step_seconds=0.05),
        settings=dict(finish_timeout=5),
    )


# Mode


def mode(*arguments: str) -> str:
    return parse_args(DOC, [*arguments]).mode


def test_mode_is_the_flag_else_the_environment_else_by_login(monkeypatch, capsys):
    assert mode() == "offline"
    assert capsys.readouterr().out.count("\n") == 1
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert mode() == "online"
    assert mode("--mode", "online") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert mode() == "disabled"
    assert mode("--mode", "offline") == "offline"
    assert capsys.readouterr().out == ""


def test_a_mode_that_is_none_in_the_environment_ends_with_one_line(monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "dreaming")
    with pytest.raises(SystemExit):
        mode()
    assert "the W&B mode is 'dreaming'" in capsys.readouterr().err


def test_wandb_offline_is_heeded(monkeypatch, tmp_path, capsys):
    environ = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    subprocess.run([sys.executable, "-m", "wandb", "offline"], cwd=tmp_path, env=environ, check=True)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert mode() == "offline"
    assert mode("--mode", "online") == "online"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert mode() == "online"


def test_a_login_in_netrc_is_found(tmp_path):
    netrc = Path(tmp_path, ".netrc")
    netrc.write_text(f"machine api.wandb.ai login user password {'k' * 40}\n")
    netrc.chmod(0o600)
    assert mode() == "online"


def test_a_login_for_another_server_is_none(monkeypatch, tmp_path):
    Path(tmp_path, ".netrc").write_text(f"machine api.wandb.ai login user password {'k' * 40}\n")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    assert mode() == "offline"


def test_a_key_that_can_not_be_right_ends_with_one_line(monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "secret7")
    with pytest.raises(SystemExit):
        mode()
    error = capsys.readouterr().err
    assert "the API key can't be right" in error
    assert error.count("\n") == 1
    assert "secret7" not in error


# Address


def test_the_address_is_the_flag_else_the_environment_s_if_something_listens_there(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        assert parse_args(DOC, ["--address", address]).address == address
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert parse_args(DOC, []).address == address
        assert parse_args(DOC, ["--address", "local"]).address is None
        assert parse_args(DOC, ["--address", "auto"]).address == "auto"
    with pytest.raises(SystemExit):
        parse_args(DOC, [])
