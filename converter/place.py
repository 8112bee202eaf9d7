"""Put files and folders into their place: whole or not at all, durably, under unpredictable names.

What is being written lies beside its place, under a hidden name, and its writer holds a lock on it. So what a killed
process has left behind is told from what a living one is writing, and the next run clears it away.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import fcntl
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from huggingface_hub import constants
from safetensors import SafetensorError

from converter import interrupt
from converter.errors import OutputError, said

HIDDEN = ".nmsparse-"
# What is being swapped in several steps: the new entries, complete; the old ones, some or all of them.
READY, SOME, ALL = ".ready", ".some", ".all"
LEFT_ALONE = {"lost+found"}  # of a file system, in its root
EXCHANGE = 2  # Linux: RENAME_EXCHANGE; macOS: RENAME_SWAP


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write beside `path`, and put that in its place once it is whole; a link there is replaced.

    Raises:
        OSError: when it cannot be written.
        OutputError: when there is something else than a file.
    """
    if path.exists() and not path.is_file():
        raise OutputError(f"{path}: must be a file, got something else. Give another.")
    clear_stale(path.parent)
    handle, name = tempfile.mkstemp(path.suffix, HIDDEN, path.parent)  # torch wants a name of two parts
    beside = Path(name)
    try:
        _lock(handle)
        try:
            write(beside)
        except (RuntimeError, SafetensorError) as error:  # what torch and safetensors make of a full disk
            raise OSError(errno.EIO, said(error), str(path)) from error
        beside.chmod(0o666 & ~_umask())
        _sync(beside)
        os.replace(beside, path)
        _sync(path.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)


def private(*parts: str) -> Path:
    """Return a folder of ours in the Hub's cache, which only its user may read.

    Raises:
        OutputError: when it cannot be made, or belongs to somebody else.
    """
    home = Path(constants.HF_HOME) / "nmsparse"
    folder = home.joinpath(*parts)
    try:
        folder.mkdir(0o700, parents=True, exist_ok=True)
        about = home.lstat()
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid():
            raise OutputError(f"{home}: must be a folder of this user's own, got another's. Set HF_HOME to another.")
        if about.st_mode & 0o077:
            home.chmod(0o700)
    except OSError as error:
        raise OutputError(f"{folder}: must be a folder that can be written, got {error}. Set HF_HOME.") from error
    return folder


@contextmanager
def replacing(place: Path) -> Iterator[Path]:
    """Give an empty folder that takes its `place` when the block ends well; else what was there is as it was.

    A link leads to the place itself. What was there is exchanged for the new in one step where the system can. Where
    the folder cannot be moved (a mount, the working directory, a parent that is not ours to write) its entries are.

    Raises:
        OSError: when it cannot be written, before the block where that can be known.
    """
    place = Path(os.path.realpath(place))
    made = [folder for folder in place.parents if not folder.exists()]
    place.parent.mkdir(parents=True, exist_ok=True)
    within = place.is_dir() and not _movable(place)
    where = place if within else place.parent
    clear_stale(where)
    staging, handle = _held(where)
    try:
        if place.exists() and not within:
            _try_rename(place, staging)
        yield encodable(staging)
        _settle(staging)
        interrupt.check()
        if within:
            _swap_entries(place, staging)
        else:
            _swap(place, staging)
    finally:
        os.close(handle)
        shutil.rmtree(staging, ignore_errors=True)
        if not place.exists():
            for folder in made:
                with suppress(OSError):
                    folder.rmdir()


def clear_stale(folder: Path) -> list[str]:
    """Clear what killed processes have left in `folder`, and return its names; what a living one holds stays."""
    cleared = []
    try:
        left = sorted(path for path in folder.iterdir() if path.name.startswith(HIDDEN))
    except OSError:
        return []
    for path in left:
        swap = path.suffix in {READY, SOME, ALL}
        try:
            with taken(path.with_suffix(READY) if swap and path.with_suffix(READY).exists() else path) as free:
                if free and swap:
                    _finish(folder, path.with_suffix(""))
                elif free and path.is_dir():
                    shutil.rmtree(path)
                elif free:
                    path.unlink()
                if free:
                    cleared.append(path.name)
        except OSError:  # gone, or not ours
            continue
    return cleared


@contextmanager
def taken(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Lock a file or a folder inside the block, and say whether no other process holds it; or `wait` until it does."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        yield _lock(handle, wait=wait)
    finally:
        os.close(handle)


def free_bytes(place: Path) -> int:
    """Return how many bytes are free on the disk that `place` is, or will be, on."""
    path = Path(os.path.realpath(place))
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def is_utf8(text: str) -> bool:
    """Return whether the text, such as the name of a file, can be written as UTF-8, which some libraries want."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def encodable(folder: Path) -> Path:
    """Return a name of the folder that is UTF-8: its own, or that of a link to it, which goes with the process."""
    if is_utf8(str(folder)):
        return folder
    beside = Path(tempfile.mkdtemp(prefix="nmsparse-"))
    atexit.register(shutil.rmtree, beside, ignore_errors=True)
    (beside / "folder").symlink_to(os.path.abspath(folder))
    return beside / "folder"


def _settle(folder: Path) -> None:
    """Give everything in the folder the permissions of what is new, and have it on the disk."""
    mask = _umask()
    for path in [*folder.rglob("*"), folder]:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP, errno.EROFS}:  # what cannot be synchronised there
            raise
    finally:
        os.close(handle)


def _lock(handle: int, *, wait: bool = False) -> bool:
    """Return whether this process holds the lock now, and so no other; on a file system without locks it does not."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _held(where: Path) -> tuple[Path, int]:
    """Return a new folder in `where`, and the handle that its lock is on."""
    while True:
        # Named before it is made: an interruption may come as soon as it is there.
        folder = where / f"{HIDDEN}{uuid4().hex}"
        try:
            folder.mkdir(0o700)
            try:
                handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                continue
            _lock(handle)
            if folder.exists():  # else another run took it for a stale one before it was locked
                return folder, handle
            os.close(handle)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _movable(place: Path) -> bool:
    """Return whether the folder can be moved: no mount, not where a shell stands, in a parent that we may write."""
    here = Path(os.path.realpath(os.curdir))
    return not (
        place == here or place in here.parents or _is_mount(place) or not os.access(place.parent, os.W_OK | os.X_OK)
    )


def _is_mount(place: Path) -> bool:
    if os.path.ismount(place):
        return True
    try:  # a bind mount has its parent's device
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    escaped = os.fsencode(place)
    for octal, byte in ((b"\\134", b"\\"), (b"\\040", b" "), (b"\\011", b"\t"), (b"\\012", b"\n")):
        escaped = escaped.replace(byte, octal)
    return any(line.split(b" ")[4] == escaped for line in lines)


def _try_rename(place: Path, staging: Path) -> None:
    """Raise what renaming `place` would raise. Nothing can take the place of a folder that is not empty."""
    probe = staging / "probe"
    probe.touch()
    try:
        os.rename(place, staging)
    except OSError as error:
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
            raise
    probe.unlink()


def _swap(place: Path, staging: Path) -> None:
    """Put the folder `staging` in its place, and have what was there, if anything, under its name."""
    if not place.exists():
        os.rename(staging, place)
    elif not _exchanged(staging, place):
        ready, old = (staging.with_suffix(suffix) for suffix in (READY, ALL))
        ready.mkdir(0o700)
        with taken(ready):
            os.rename(staging, ready / place.name)
            old.mkdir(0o700)
            os.rename(place, old / place.name)
            _finish(place.parent, staging)
    _sync(place.parent)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; return whether the system can."""
    library = ctypes.CDLL(None, use_errno=True)
    try:
        if sys.platform == "darwin":
            failed = library.renamex_np(os.fsencode(one), os.fsencode(other), EXCHANGE)
        else:
            here = -100  # AT_FDCWD
            failed = library.renameat2(here, os.fsencode(one), here, os.fsencode(other), EXCHANGE)
    except AttributeError:
        return False
    number = ctypes.get_errno()
    if failed and number not in {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}:
        raise OSError(number, os.strerror(number), str(other))
    return not failed


def _swap_entries(place: Path, staging: Path) -> None:
    """Put the entries of `staging`, a folder in `place`, in the place of those that are there."""
    some = staging.with_suffix(SOME)
    with taken(place, wait=True):
        os.rename(staging, staging.with_suffix(READY))
        try:
            some.mkdir(0o700)
            for entry in sorted(place.iterdir()):
                if not entry.name.startswith(HIDDEN) and entry.name not in LEFT_ALONE:
                    os.rename(entry, some / entry.name)
            os.rename(some, staging.with_suffix(ALL))
        finally:
            _finish(place, staging)
        _sync(place)


def _finish(place: Path, staging: Path) -> None:
    """End a swap of entries of `place`: while only some old ones are away they come back, else the new ones come in."""
    ready, some, old = (staging.with_suffix(suffix) for suffix in (READY, SOME, ALL))
    coming = some if some.is_dir() else ready if ready.is_dir() and old.is_dir() else None
    for entry in [] if coming is None else sorted(coming.iterdir()):
        if not (place / entry.name).exists():
            os.rename(entry, place / entry.name)
    for folder in (ready, some, old):
        shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    """Return which permissions new files do not get."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
