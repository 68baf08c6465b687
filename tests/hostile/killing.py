"""A writer that dies, finds the disk full, or is photographed, at its n-th step that changes a disk.

Such a step is a file opened to write, synced, renamed, linked or deleted, a folder made, exchanged or deleted. What is
written between opening and syncing is struck too: the file is cut to nothing, or in half, or a write fails midway.
Nothing is really synced meanwhile: what was written outlives its process without that.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import stat
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from cl_adapters import _io
from cl_adapters.errors import ClAdaptersError

Act = Callable[[], object]
Strike = Callable[[str, int | None], None]

GIVING = {"os.remove", "os.rmdir", "shutil.rmtree", "os.truncate"}
"""Audit events of Python for what gives space back; raised before it happens, as those that take some."""
TAKING = {"os.rename", "os.mkdir", "os.link"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CUTS = (None, 0.0, 0.5)
"""Shares of the file being synced that get to the disk; None: at every step, with the file as it is."""
EVERY = range(1, 2000)
SIZES = (0, 60, 200, 1000, 5000)

_striking: list[Strike] = []


@contextmanager
def before_each_step(strike: Strike) -> Iterator[None]:
    """Call ``strike`` before each step of the ``with`` block: with its name, and the handle where it is a sync."""
    if not hasattr(sys, "_hears_steps"):  # a hook stays for ever
        setattr(sys, "_hears_steps", True)  # noqa: B010 (not an attribute that it has)
        sys.addaudithook(_hear)
    sync, exchange = os.fsync, _io._exchange

    def exchanging(one: Path, other: Path) -> bool:
        strike("exchange", None)
        return exchange(one, other)

    _set(partial(strike, "fsync"), exchanging)
    _striking.append(strike)
    try:
        yield
    finally:
        _striking.pop()
        _set(sync, exchange)


def _set(sync: Any, exchange: Any) -> None:
    setattr(os, "fsync", sync)  # noqa: B010 (the type checker wants the full signature)
    setattr(_io, "_exchange", exchange)  # noqa: B010


def _hear(event: str, args: tuple[Any, ...]) -> None:
    if _striking and (event in GIVING or event in TAKING or (event == "open" and args[2] & WRITING)):
        _striking[-1](event, None)


def being_written(handle: int | None) -> Path | None:
    """The file that is synced, if it is one under a hidden name; others are read, and were synced before."""
    if handle is None or not stat.S_ISREG(os.fstat(handle).st_mode):
        return None
    path = Path(os.readlink(f"/proc/self/fd/{handle}"))
    return path if any(part.startswith(".") for part in path.parts) else None


# --- photographs -----------------------------------------------------------------------------------------------------


def photographed(act: Act, folder: Path, photos: Path) -> list[Path]:
    """Do it once: copies of the folder as a death at each step would leave it, also of cut files, and as it ends."""
    photos.mkdir()
    taken: list[Path] = []

    def strike(event: str, handle: int | None) -> None:
        path = being_written(handle)
        for cut in CUTS if path is not None else CUTS[:1]:
            taken.append(photos / f"{len(taken):04d}")
            with before_each_step(lambda event, handle: None):  # the copying is no step
                shutil.copytree(folder, taken[-1])
                if path is not None and cut is not None:
                    os.truncate(taken[-1] / path.relative_to(folder.resolve()), int(cut * path.stat().st_size))

    with before_each_step(strike):
        act()
    strike("end", None)
    return taken


# --- deaths ----------------------------------------------------------------------------------------------------------


@contextmanager
def forked(act: Act) -> Iterator[int]:
    """Run ``act`` in a child for the ``with`` block, and kill it where it is still there at the end.

    The child ends with os._exit, so that nothing of the test runner runs twice.
    """
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # never outlive a hanging test
        try:
            act()
        except BaseException:
            os.write(2, traceback.format_exc().encode())
            os._exit(1)
        os._exit(0)
    try:
        yield child
    finally:
        try:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def outcome(child: int) -> int:
    """Wait for a child: 0, or minus the signal that killed it. Any failure of its own is an error."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), "the child failed or hung; its traceback is above"
    return code


def deaths(prepare: Act, act: Act, points: Iterable[int] = EVERY) -> Iterator[str]:
    """Let a child kill itself (SIGKILL) at these steps of ``act``, as far as it goes; yield what was done to it."""
    for cut in CUTS:
        for point in points:
            prepare()
            with forked(partial(dying, act, point, cut)) as child:
                code = outcome(child)
            if code == 0:
                break
            yield f"killed at step {point}" if cut is None else f"killed at sync {point} of a file cut to {cut}"


def dying(act: Act, point: int, cut: float | None) -> None:
    """Do it and die at the n-th step; or at the n-th sync of a file, of which only a share was written."""
    left = point

    def strike(event: str, handle: int | None) -> None:
        nonlocal left
        path = None if cut is None else being_written(handle)
        if cut is not None and path is None:
            return
        left -= 1
        if left == 0:
            if cut is not None and path is not None:
                os.truncate(path, int(cut * path.stat().st_size))
            os.kill(os.getpid(), signal.SIGKILL)

    with before_each_step(strike):
        act()


# --- full disks ------------------------------------------------------------------------------------------------------


def full_disks(prepare: Act, act: Act, points: Iterable[int] = EVERY) -> Iterator[tuple[str, bool]]:
    """Let the disk be full at these steps of ``act``, from then on or just then; yield which, and if it refused."""
    for stays in (True, False):
        for point in points:
            prepare()
            left = point

            def strike(event: str, handle: int | None, stays: bool = stays) -> None:
                nonlocal left
                if event not in GIVING:
                    left -= 1
                    if left == 0 or (stays and left < 0):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            refused = refuses(act, before_each_step(strike), os.strerror(errno.ENOSPC))
            if left > 0:
                break
            yield f"no space {'from' if stays else 'at'} step {point}", refused


def cut_writes(prepare: Act, act: Act, sizes: Iterable[int] = SIZES) -> Iterator[tuple[str, bool]]:
    """Let no file grow beyond a size: a write itself fails, midway; yield where, and whether it refused."""
    for size in sizes:
        prepare()
        yield f"no file beyond {size} bytes", refuses(act, files_up_to(size), "")


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def refuses(act: Act, trouble: AbstractContextManager[None], reason: str) -> bool:
    """Whether it ends, in trouble, with one clear error that names the reason; False: it went another way."""
    try:
        with trouble:
            act()
    except ClAdaptersError as error:
        said = str(error)
    else:
        return False
    assert reason in said and "\n" not in said, said
    return True
