"""Endless inputs, or those that inflate to a thousand times their size, end a command at once."""

import gzip
import os
import resource

import pytest
from commands import invoke


@pytest.fixture(params=["pipe", "link to zero", "bomb.gz", "sparse"])
def endless(request, tmp_path):
    path = tmp_path / request.param
    if request.param == "pipe":
        os.mkfifo(path)
    elif request.param == "link to zero":
        path.symlink_to("/dev/zero")
    elif request.param == "sparse":
        path.touch()
        os.truncate(path, 40 * 2**30)
    else:
        with gzip.open(path, "wb", compresslevel=1) as file:
            for _ in range(600):
                file.write(bytes(2**20))
    return path


@pytest.mark.parametrize("command", ["write", "ask"])
def test_an_endless_text_is_refused_at_once(tmp_path, endless, command):
    (tmp_path / "checkpoint").mkdir()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if command == "write":
        result = invoke("write", endless, "--checkpoint", tmp_path / "checkpoint", "--output", tmp_path / "states")
    else:
        result = invoke("ask", "w1", "--text", endless, "--checkpoint", tmp_path / "checkpoint")
    assert result.exit_code == 2, result.output
    message = " ".join(result.stderr.split())
    assert "expected a regular file" in message or "134,217,728" in message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024, "kilobytes"
