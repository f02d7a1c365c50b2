"""One writer at a time, by the operating system's locks (flock).

Such a lock ends with the process that has it, however that ends, so a lock file that is left over keeps nobody out.
Where there are no such locks (Windows, some network file systems) nobody is kept out at all. Readers need none: what
they read is replaced as a whole (train/checkpoint.py).
"""

import contextlib
import os
import socket
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"  # in a run directory. It says who has the lock, for the message that names them
_held = {}  # the run directories' locks of this process: (device, inode) -> descriptor


@contextlib.contextmanager
def only_one(path: Path):
    """Inside, the lock of this file is held, after whoever had it."""
    with open(path, "w") as file:
        _lock(file.fileno(), wait=True)
        yield


def take_lock(directory: str | Path) -> None:
    """Makes this process the one that writes into a run directory, until `release_lock` or its end; twice is once.

    Raises BlockingIOError where another process writes, and OSError where nothing can be written; in one line.
    """
    try:
        descriptor = os.open(Path(directory) / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise type(error)(f"run directory {directory} cannot be written: {error.strerror}") from None
    key = _key(os.fstat(descriptor))
    if key in _held:
        os.close(descriptor)
        return
    _lock_or_close(descriptor, directory)
    with contextlib.suppress(OSError):  # a full disk: then the name is missing, the lock is not
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    _held[key] = descriptor


def release_lock(directory: str | Path) -> None:
    """Lets others write into the directory, if this process had its lock."""
    with contextlib.suppress(OSError):  # the directory is gone
        if (descriptor := _held.pop(_key(os.stat(Path(directory) / LOCK)), None)) is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)
            os.close(descriptor)


@contextlib.contextmanager
def released_after(directory: str | Path | None):
    """Lets go of the directory's lock when the block ends, however it ends; None is no directory."""
    try:
        yield
    finally:
        if directory is not None:
            release_lock(directory)


def refuse_if_written(directory: str | Path) -> None:
    """Raises BlockingIOError as `take_lock` would, so that a command can stop at once; nothing is taken or written."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):  # then nobody writes there, or
        descriptor = os.open(Path(directory) / LOCK, os.O_RDONLY)  # we cannot either, which is said when we try
        if _key(os.fstat(descriptor)) not in _held:
            _lock_or_close(descriptor, directory, shared=True)
        os.close(descriptor)


def _lock_or_close(descriptor, directory, shared=False):
    try:
        _lock(descriptor, shared=shared)
    except BlockingIOError:
        with open(descriptor, encoding="utf-8") as file:
            who = file.read() or "another process"
        raise BlockingIOError(
            f"run directory {directory} is being written by {who}: wait for it, stop it, or choose another --out-dir"
        ) from None


def _lock(descriptor, wait=False, shared=False):
    """Raises BlockingIOError where another has the lock and we do not wait."""
    if fcntl is not None:
        how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        try:
            fcntl.flock(descriptor, how)
        except BlockingIOError:
            raise
        except OSError:  # a file system without locks
            pass


def _key(status):
    return status.st_dev, status.st_ino


def _close_in_child():
    # a child that is forked (a worker that loads data) has the lock as well, and would keep it past its parent's death
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
