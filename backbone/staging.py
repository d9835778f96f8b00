"""What a worker does with an artifact: checks it, and brings its files to where the pipeline actor finds them."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from . import media, values

PIECE = 8 << 20  # bytes of a file that travel at once between nodes


def check(name: str, type: str, metadata: Mapping[str, Any] | None, aliases: Sequence[str]) -> dict[str, Any]:
    """An artifact's description, in plain values: the pipeline actor has none of the caller's classes.

    Raises ValueError for what W&B refuses, TypeError for what can't be sent.
    """
    import wandb

    artifact = wandb.Artifact(name, type, metadata=dict(metadata or {}))
    values.pack(dict(metadata or {}), f"metadata of artifact {name!r}:")
    if isinstance(aliases, str) or any(not isinstance(a, str) or not a or set(a) & set("/:") for a in aliases):
        raise ValueError(f"aliases must be names without '/' and ':', not {aliases!r}")
    names = dict(name=values.as_text(name), type=values.as_text(type), aliases=[*map(values.as_text, aliases)])
    return names | dict(metadata=artifact.metadata)


def contents(artifact: str, files: Any) -> dict[str, dict[str, Any]]:
    """An artifact's `files` (name -> bytes or path), `references` and `objects` of W&B's.

    files: all of these by name, or paths only; a folder stands for the files below it and below what it links to.
    Raises ValueError, TypeError or OSError.
    """
    if isinstance(files, str | Path):
        files = {"" if Path(files).is_dir() else Path(files).name: files}
    elif not isinstance(files, Mapping):
        paths = list(files)
        files = {Path(path).name: path for path in paths}
        if len(files) < len(paths):
            raise ValueError(f"files of artifact {artifact!r} share a name: pass a mapping from name to path")
    found: dict[str, Any] = {}
    for name, what in files.items():
        if isinstance(what, str | Path) and "://" not in str(what) and Path(what).is_dir():
            found |= {str(PurePosixPath(name, path.relative_to(what))): path for path in files_below(Path(what))}
        else:
            found[name] = what
    if not found:
        raise ValueError(f"artifact {artifact!r} has no files")
    sorted_: dict[str, dict[str, Any]] = {"files": {}, "references": {}, "objects": {}}
    for name, what in found.items():
        if not isinstance(name, str) or not name or name[0] == "/" or ".." in Path(name).parts:
            raise ValueError(f"file {name!r} must be a relative path without '..', as its name in the artifact")
        own_name = values.as_text(name)
        if media.is_data_type(what):
            sorted_["objects"][own_name] = what
        elif isinstance(what, str) and "://" in what:
            sorted_["references"][own_name] = values.as_text(what)
        elif isinstance(what, bytes | str | Path):
            if not isinstance(what, bytes):
                open(what, "rb").close()  # raises here and now
            sorted_["files"][own_name] = what
        else:
            raise TypeError(f"file {name!r} must be bytes, a path, a reference or a W&B data type, not {what!r:.80}")
    return sorted_


def stage(
    content: Mapping[str, Mapping[str, Any]], folder: Path, send: Callable[[Path, int, bytes], object] | None
) -> dict[str, Any]:
    """Brings an artifact's files into `folder`, on this node or by `send`; later changes of them don't change it.

    Returns what the pipeline actor must know of the content.
    """
    for name, source in content["files"].items():
        if send:
            for offset, piece in pieces(source, PIECE):
                send(folder / name, offset, piece)
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, bytes):
            (folder / name).write_bytes(source)
        else:
            copy(source, folder / name)
    return {**content, "files": [*content["files"]], "objects": values.pack(content["objects"], "file")}


def put_piece(to: Path, offset: int, piece: bytes) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    to.touch()
    with to.open("r+b") as file:
        file.seek(offset)
        file.write(piece)


def files_below(folder: Path, above: Sequence[Path] = ()) -> Iterator[Path]:
    """Files and broken links. Follows links, as W&B's `Artifact.add_dir` does, except to a folder that it is in."""
    above = [*above, folder.resolve()]
    for path in folder.iterdir():
        if path.is_dir():
            if path.resolve() not in above:
                yield from files_below(path, above)
        elif path.is_file() or (path.is_symlink() and not path.exists()):
            yield path


def copy(source: str | Path, to: Path) -> None:
    """Makes a file that stays as it is, whatever becomes of its source, even if that is rewritten in place.

    It takes no room where the file system can let files share blocks until one of them changes.
    """
    with open(source, "rb") as file, open(to, "wb") as made:
        with contextlib.suppress(AttributeError, OSError):  # not on this system, not between these two
            while os.copy_file_range(file.fileno(), made.fileno(), 1 << 30):
                pass
        shutil.copyfileobj(file, made, 1 << 20)  # the rest, if there is one


def pieces(content: bytes | str | Path, size: int) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of each piece of a file, `size` bytes at most; at least one."""
    offset = 0
    with io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as file:
        while (piece := file.read(size)) or not offset:
            yield offset, piece
            offset += size
