"""The image files that a command line names."""

import logging
from pathlib import Path

from retinanet_keras.errors import DataError

logger = logging.getLogger("retinanet_keras")

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")


def image_files(paths):
    """Image files and those in folders.

    Args:
        paths: of files and folders; in folders, files with another suffix than IMAGE_SUFFIXES are skipped, and what
            has such a suffix and is no regular file (a named pipe, of which reading may never end), with a warning.

    Returns:
        a list of (path, name). The name of a file in a folder is relative to it; names that come again are numbered:
        what is written under them must not replace each other.

    Raises:
        DataError: where a path does not exist or is no regular file, or a folder holds none.
    """
    seen, files = {}, []
    for path, name in _found(paths):
        seen[name] = seen.get(name, 0) + 1
        files.append((path, name if seen[name] == 1 else f"{name}-{seen[name]}"))
    return files


def _found(paths):
    for path in map(Path, paths):
        if path.is_dir():
            named = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES and not p.is_dir()]
            files = [p for p in named if p.is_file()]
            if len(files) < len(named):
                other = next(p for p in named if not p.is_file())
                logger.warning("%s: skipped %d that are not regular files, such as %s", path,
                               len(named) - len(files), other)  # fmt: skip
            if not files:
                raise DataError(f"{path} holds no image files ({', '.join(IMAGE_SUFFIXES)})")
            yield from ((file, str(file.relative_to(path))) for file in files)
        elif path.is_file():
            yield path, path.name
        elif path.exists():
            raise DataError(f"{path} is not a regular file. Images are read from files and folders alone")
        else:
            raise DataError(f"There is no image {path}")
