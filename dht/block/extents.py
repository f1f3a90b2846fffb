"""Copying a file's bytes without taking disk for them twice, where the file system can (XFS, btrfs).

`copy_file_range` (Linux) shares extents if both ends lie at whole pages, and copies inside the kernel if not;
file systems and systems without it get a plain copy.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

PAGE_BYTES = 4096
"""What extents are counted in, nearly everywhere."""
CHUNK_BYTES = 1 << 20
_WITHOUT = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
"""What says that this file system, or this pair of them, cannot."""


def append_file(path: Path, descriptor: int) -> int:
    """Write the file at `path` to an open one, where that stands; how many bytes. Raises `OSError`."""
    with path.open("rb", buffering=0) as source:
        left = size = os.fstat(source.fileno()).st_size
        try:
            while left:
                count = os.copy_file_range(source.fileno(), descriptor, left)
                if not count:
                    break
                left -= count
        except OSError as error:
            if error.errno not in _WITHOUT:
                raise
        while left and (data := source.read(CHUNK_BYTES)):
            write_all(descriptor, data)
            left -= len(data)
        return size - left


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of `data`. Raises `OSError`."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
