"""Files that are there whole or not at all."""

import os
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(*paths):
    """Temporary paths to write in the place of `paths`. When the block ends they are synced to the disk and renamed, in
    this order, so that whoever reads, or loses power, finds the old file or the new one. If it fails, none is replaced.
    """
    paths = [Path(path) for path in paths]
    temporary = [path.with_name(f".{path.name}.tmp") for path in paths]
    try:
        yield temporary
        for file in temporary:
            sync(file)
        for file, path in zip(temporary, paths, strict=True):
            os.replace(file, path)
        for directory in {path.parent for path in paths}:
            sync(directory)
    finally:
        for file in temporary:
            file.unlink(missing_ok=True)


def sync(path):
    """Waits until the file, or the names in the directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
