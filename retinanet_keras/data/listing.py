"""Image files named on a command line."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from retinanet_keras.errors import DataError

logger = logging.getLogger("retinanet_keras")

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")


def image_files(paths: Iterable[str | os.PathLike[str]]) -> list[tuple[Path, str]]:
    """List image files, and those in folders and their subfolders.

    Args:
        paths: of files and folders. In folders, files with a suffix not in IMAGE_SUFFIXES are skipped. What has such a
            suffix and is no regular file (a named pipe, which may block forever) is skipped with a warning.

    Returns:
        a list of (path, name). The name of a file in a folder is relative to the folder. Repeated names are numbered,
        so that files written under these names do not overwrite each other.

    Raises:
        DataError: a path does not exist or is no regular file, or a folder contains no images.
    """
    seen: dict[str, int] = {}
    files = []
    for path, name in _paths_and_names(paths):
        seen[name] = seen.get(name, 0) + 1
        files.append((path, name if seen[name] == 1 else f"{name}-{seen[name]}"))
    return files


def _paths_and_names(paths: Iterable[str | os.PathLike[str]]) -> Iterator[tuple[Path, str]]:
    for path in map(Path, paths):
        if path.is_dir():
            named = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES and not p.is_dir()]
            files = [p for p in named if p.is_file()]
            if len(files) < len(named):
                other = next(p for p in named if not p.is_file())
                skipped = len(named) - len(files)
                logger.warning("%s: skipped %d paths that are not regular files, such as %s", path, skipped, other)
            if not files:
                raise DataError(f"{path} holds no image files ({', '.join(IMAGE_SUFFIXES)}). Name a folder with images")
            yield from ((file, str(file.relative_to(path))) for file in files)
        elif path.is_file():
            yield path, path.name
        elif path.exists():
            raise DataError(f"{path} is not a regular file. Name image files, or folders that contain them")
        else:
            raise DataError(f"The image {path} does not exist. Check the path")
