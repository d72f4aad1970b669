"""Writing files and folders: complete or not at all, with the permissions of any new file.

safetensors and `tempfile` make files that their owner alone can read, whatever the umask. All that
this package writes goes through here instead.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def path_of(name: str | os.PathLike) -> Path:
    """A path of the user's, who may mean the home directory by ``~``."""
    return Path(os.path.expanduser(name))


def parse_json(text: str | bytes) -> Any:
    """What is in JSON whose objects have each key once: of two values, one would be ignored.

    Raises:
        ValueError: it is no JSON, too deep, or a key is there twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_each_key_once)
    except RecursionError as error:
        raise ValueError(str(error)) from None


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in result if keys.count(key) > 1)
        raise ValueError(f"expected each key once, got {twice!r} several times")
    return result


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Waits for others, threads or processes, that are in here for the same folder.

    A disk without locks lets everyone in.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def check_new_folder(output: str | os.PathLike, *sources: Path) -> Path:
    """The folder behind any links, known to be absent or empty, and outside of the sources.

    Raises:
        FileExistsError: it is not.
    """
    folder = path_of(output).resolve()
    got = ""
    if folder.is_dir():
        got = "one with content" if any(folder.iterdir()) else ""
    elif folder.exists():
        got = "a file"
    elif file := next((p for p in folder.parents if p.exists() and not p.is_dir()), None):
        got = f"a path through {file}, a file"
    if got:
        raise FileExistsError(
            f"{output}: expected a new or empty folder, got {got}: choose another, nothing is "
            "overwritten"
        )
    for source in sources:
        if source.resolve() in (folder, *folder.parents):
            raise FileExistsError(
                f"{output}: expected a folder outside of {source}, which is read: choose another"
            )
    return folder


@contextmanager
def new_folder(output: str | os.PathLike, *sources: Path) -> Iterator[Path]:
    """A folder to write to that becomes output when the block ends, and vanishes if it fails.

    Raises:
        FileExistsError: output exists and is not an empty folder, or is inside of a source.
    """
    folder = check_new_folder(output, *sources)
    if folder.exists():  # perhaps the working directory or a mount, which cannot be replaced
        with staging_folder(folder) as staging:
            yield staging
            move_into(staging, folder)
        return
    made = _make_parents(folder)
    try:
        with staging_folder(folder.parent) as staging:
            yield staging
            _sync_tree(staging)
            os.rename(staging, folder)
            _sync(folder.parent)
    except BaseException:
        for parent in made:
            with suppress(OSError):  # what others have put there since stays
                parent.rmdir()
        raise


def _make_parents(folder: Path) -> list[Path]:
    """The folders above that had to be made, the innermost first."""
    missing = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    return missing


@contextmanager
def staging_folder(parent: Path) -> Iterator[Path]:
    """A folder in parent that is gone, with what is left in it, when the block ends."""
    staging = parent / f".saving-{secrets.token_hex(8)}"
    staging.mkdir()
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def move_into(
    staging: Path, folder: Path, last: str | None = None, remove: Collection[str] = ()
) -> None:
    """Move everything in staging to a folder on the same disk, over files of the same names.

    If that fails or is interrupted, the folder is as it was.

    Args:
        staging: the folder with the new files, which are written to the disk first.
        folder: where they go.
        last: name of the file that goes last.
        remove: names of files in the folder that the new ones make obsolete.
    """
    _sync_tree(staging)
    files = sorted(staging.iterdir(), key=lambda file: file.name == last)
    with staging_folder(folder) as old, ExitStack() as undo:
        for name in remove:
            _keep(folder / name, old / name)
            undo.callback(os.replace, old / name, folder / name)
            (folder / name).unlink()
        for file in files:
            target = folder / file.name
            if target.exists():
                _keep(target, old / file.name)
                undo.callback(os.replace, old / file.name, target)
            else:
                undo.callback(_move_back, target, file)
            os.replace(file, target)
        undo.pop_all()
    _sync(folder)


def _keep(file: Path, copy: Path) -> None:
    try:
        os.link(file, copy)
    except OSError:  # a disk without hard links
        shutil.copy2(file, copy)


def _move_back(target: Path, file: Path) -> None:
    if target.exists():
        os.replace(target, file)


def write_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file.

    Raises:
        OSError: writing fails.
    """
    try:
        save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    except SafetensorError as error:
        if code := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None
        raise OSError(f"{path}: cannot be written: {error}") from None
    follow_umask([path])


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have a file written under another name first, so that it is complete or as it was."""
    with staging_folder(path.parent) as staging:
        write(staging / path.name)
        move_into(staging, path.parent)


def follow_umask(files: Collection[Path]) -> None:
    """Give files of one folder the permissions that a new file gets there."""
    # A file says more than the umask, which a process cannot read without changing it, and which
    # access control lists of the folder override.
    for file in files:
        probe = file.with_name(f".mode-{secrets.token_hex(8)}")
        try:
            probe.touch(exist_ok=False)
            file.chmod(probe.stat().st_mode & 0o777)
        finally:
            probe.unlink(missing_ok=True)


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            _sync(Path(parent) / name)
        _sync(Path(parent))


def _sync(path: Path) -> None:
    """Have the disk hold it, so that no later rename can come true without it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # disks that cannot, for folders
            raise
    finally:
        os.close(descriptor)
