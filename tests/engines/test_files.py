"""Files are written whole or not at all, folders are locked, and errors name what the caller knows."""

import multiprocessing
from pathlib import Path

import pytest

from nbp_errors import UsageError
from nbp_files import locked, replacing, require_space, write_text


def fill_half(path: Path) -> None:
    with replacing(path) as partial:
        assert partial.suffix == path.suffix
        partial.write_text("half")
        raise OSError(28, "No space left on device")


def test_a_write_that_fails_leaves_the_old_file_and_names_it(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old\udc80")
    assert path.read_bytes() == b"old\\udc80"
    with pytest.raises(OSError, match=r"a\.txt") as error:
        fill_half(path)
    assert error.value.filename == str(path)
    with pytest.raises(FileNotFoundError, match="other"), replacing(path):
        (tmp_path / "other").read_bytes()  # an error about another file keeps its name
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_bytes() == b"old\\udc80"


def hold(folder: str, ready: str, done: str) -> None:
    with locked(Path(folder)) as held:
        assert held
        Path(ready).touch()
        while not Path(done).exists():
            pass


def test_a_lock_is_held_once_and_ends_with_its_process(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    process = multiprocessing.get_context("fork").Process(
        target=hold, args=(str(folder), str(tmp_path / "ready"), str(tmp_path / "done")), daemon=True
    )
    process.start()
    while not (tmp_path / "ready").exists():
        assert process.is_alive()
    with locked(folder) as held:
        assert held is False
    process.kill()
    process.join()
    with locked(folder) as held:
        assert held is True
    with locked(tmp_path / "missing") as held:
        assert held is None
    assert not list(folder.iterdir())


def test_a_disk_that_is_too_small_is_refused(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "yet", 0)
    with pytest.raises(UsageError, match=r"not/yet needs 1,000,000,000\.0 GB and its disk has"):
        require_space(tmp_path / "not" / "yet", 10**18)
    assert not list(tmp_path.iterdir())
