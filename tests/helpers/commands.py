"""The command `nfq` run in this process: what it returns and prints."""

from __future__ import annotations

import json

import pytest

from nfq_core.cli import commands as cli


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command."""
    capsys.readouterr()
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as exit:
        code = exit.code
    return code, *capsys.readouterr()


def as_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    """What a command that succeeds prints with `--json`."""
    code, out, error = run(capsys, *arguments, "--json")
    assert (code, error) == (0, "")
    return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def one_line(message: str) -> str:
    """The message, which must be one clear line of the command's."""
    assert message.startswith("nfq: ")
    assert message.endswith("\n")
    assert message.count("\n") == 1
    assert "Traceback" not in message
    return message
