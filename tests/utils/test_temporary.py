"""Temporary directories: gone at the end, gone after a kill, and safe while their process lives."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from gradmem_adapter.utils.temporary import PREFIX, temporary_directory

HOLD = """
import sys, time
from pathlib import Path
from gradmem_adapter.utils.temporary import temporary_directory
with temporary_directory(Path(sys.argv[1])) as folder:
    (folder / "half").write_bytes(bytes(1000))
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds a temporary directory, and the directory's name."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    yield process, os.path.basename(process.stdout.readline().strip())
    process.kill()
    process.wait()


def test_a_temporary_directory_names_its_process_and_is_removed(tmp_path):
    with temporary_directory(tmp_path) as folder:
        assert folder.name.startswith(f"{PREFIX}{os.getpid()}-")
        (folder / "a" / "b").mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt), temporary_directory(tmp_path):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_directories_of_killed_processes_are_swept_and_live_ones_stay(tmp_path, holder):
    process, name = holder
    with temporary_directory(tmp_path):
        assert name in os.listdir(tmp_path)
    assert os.listdir(tmp_path) == [name]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert os.listdir(tmp_path) == [name], "otherwise the kill left nothing to sweep"
    with temporary_directory(tmp_path) as folder:
        assert os.listdir(tmp_path) == [folder.name]


def test_directories_of_others_are_not_swept(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").touch()
    (tmp_path / f"{PREFIX}link").symlink_to("outside")
    (tmp_path / ".gradmem").mkdir()
    with temporary_directory(tmp_path):
        pass
    assert sorted(os.listdir(tmp_path)) == [".gradmem", f"{PREFIX}link", "outside"]
    assert (tmp_path / "outside" / "file").exists()


def test_threads_do_not_sweep_each_others_directories(tmp_path):
    errors = []

    def work():
        try:
            for _ in range(100):
                with temporary_directory(tmp_path) as folder:
                    (folder / "file").write_bytes(b"x")
                    assert (folder / "file").read_bytes() == b"x"
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert os.listdir(tmp_path) == []
