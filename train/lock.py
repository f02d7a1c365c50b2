"""One writer at a time, by the operating system's file locks (flock).

The lock ends with its process, so a lock file that a killed process leaves behind blocks nobody. Systems without such
locks (Windows, some network file systems) block nobody at all. Readers need no lock: files are replaced as a whole
(train/checkpoint.py).
"""

import contextlib
import os
import socket
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"  # in a run directory; it names the process that holds the lock, for the error message
_held = {}  # locks of run directories that this process holds: (device, inode) -> descriptor


@contextlib.contextmanager
def only_one(path: Path):
    """Waits for the lock of this file, and holds it inside the block."""
    with open(path, "w") as file:
        _lock(file.fileno(), wait=True)
        yield


def take_lock(directory: str | Path) -> None:
    """Makes this process the only writer of a run directory until `release_lock` or its end. A second call is harmless.

    Raises BlockingIOError if another process writes there, OSError if nothing can be written; in one line.
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
    with contextlib.suppress(OSError):  # on a full disk the name is missing, but the lock holds
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    _held[key] = descriptor


def release_lock(directory: str | Path) -> None:
    """Lets other processes write into the directory, if this process holds its lock."""
    with contextlib.suppress(OSError):  # the directory is gone
        if (descriptor := _held.pop(_key(os.stat(Path(directory) / LOCK)), None)) is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)
            os.close(descriptor)


def refuse_if_written(directory: str | Path) -> None:
    """Raises BlockingIOError as `take_lock` does, but takes and writes nothing: a command can stop early."""
    # if the file is missing or not ours to read, nobody writes there or the first write says what is wrong
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        descriptor = os.open(Path(directory) / LOCK, os.O_RDONLY)
        if _key(os.fstat(descriptor)) not in _held:
            _lock_or_close(descriptor, directory, shared=True)
        os.close(descriptor)


def _lock_or_close(descriptor, directory, shared=False):
    try:
        _lock(descriptor, shared=shared)
    except BlockingIOError:
        with open(descriptor, encoding="utf-8") as file:
            writer = file.read() or "another process"
        raise BlockingIOError(
            f"run directory {directory} is being written by {writer}: wait for it, stop it, or choose another --out-dir"
        ) from None


def _lock(descriptor, wait=False, shared=False):
    """Raises BlockingIOError if another process holds the lock and `wait` is False."""
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
    # a forked child, such as a worker that loads data, inherits the lock and would hold it after its parent's death
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
