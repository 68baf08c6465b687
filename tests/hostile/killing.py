"""Children that die, find the disk full, or are photographed, at their n-th step that changes a disk.

Such a step is a file opened to write, synced, renamed, linked or deleted, a folder made, exchanged or deleted. What is
written between opening and syncing is struck too: the file is cut to nothing, or in half, before the child dies.
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
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from cl_adapters import _io
from cl_adapters.errors import ClAdaptersError

GIVING = {"os.remove", "os.rmdir", "shutil.rmtree", "os.truncate"}
"""Audit events of Python for what gives space back; raised before it happens, as those that take some."""
TAKING = {"os.rename", "os.mkdir", "os.link"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CUTS = (None, 0.0, 0.5)
"""Shares of the file being synced that get to the disk; None: die at every step, with the file as it is."""
EVERY = range(1, 2000)
REFUSED, COPED = 3, 4
"""Exit codes of a child that found the disk full: one clear error; or it went another way and finished."""

Act = Callable[[], object]
Strike = Callable[[str, int | None], None]


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
    """Wait for a child: its exit code, or minus the signal that killed it. A failure of its own is an error."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code != 1, "the child failed; its traceback is above"
    assert code != -signal.SIGALRM, "the child hung"
    return code


def before_each_step(strike: Strike) -> None:
    """Call ``strike`` before each step of this process, for ever: with its name, and the handle where it is a sync."""
    sync, exchange = os.fsync, _io._exchange

    def hear(event: str, args: tuple[Any, ...]) -> None:
        if event in GIVING or event in TAKING or (event == "open" and args[2] & WRITING):
            strike(event, None)

    def syncing(handle: int) -> None:
        strike("fsync", handle)
        sync(handle)

    def exchanging(one: Path, other: Path) -> bool:
        strike("exchange", None)
        return exchange(one, other)

    for module, name, hooked in ((os, "fsync", syncing), (_io, "_exchange", exchanging)):
        setattr(module, name, hooked)
    sys.addaudithook(hear)


def dying(act: Act, point: int, cut: float | None) -> None:
    """Do it and die by SIGKILL at the n-th step; or at the n-th sync of a file, of which only a share was written."""
    left = point

    def strike(event: str, handle: int | None) -> None:
        nonlocal left
        if cut is not None and not is_file(handle):
            return
        left -= 1
        if left == 0:
            if cut is not None and handle is not None:
                path = f"/proc/self/fd/{handle}"
                os.truncate(path, int(cut * os.stat(path).st_size))
            os.kill(os.getpid(), signal.SIGKILL)

    before_each_step(strike)
    act()


def deaths(prepare: Act, act: Act, points: Iterable[int] = EVERY) -> Iterator[str]:
    """Let a child die at each step of ``act``, and yield what was done to it, until it gets to the end."""
    for cut in CUTS:
        for point in points:
            prepare()
            with forked(partial(dying, act, point, cut)) as child:
                code = outcome(child)
            if code == 0:
                break
            assert code == -signal.SIGKILL
            yield f"killed at step {point}" if cut is None else f"killed at sync {point} of a file cut to {cut}"


def filling(act: Act, point: int, stays: bool) -> None:
    """Do it on a disk that is full at the n-th step that takes space, and ``stays`` so; ends the process."""
    left = point

    def strike(event: str, handle: int | None) -> None:
        nonlocal left
        if event in GIVING:
            return
        left -= 1
        if left == 0 or (stays and left < 0):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before_each_step(strike)
    refusable(act, os.strerror(errno.ENOSPC), lambda: left <= 0)


def refusable(act: Act, reason: str, struck: Callable[[], bool]) -> None:
    """Do it and exit: REFUSED where one clear error names the reason, COPED or 0 where it finished, struck or not."""
    try:
        act()
    except ClAdaptersError as error:
        said = str(error)
    else:
        os._exit(COPED if struck() else 0)
    assert reason in said and "\n" not in said, said
    os._exit(REFUSED)


def full_disks(prepare: Act, act: Act, points: Iterable[int] = EVERY) -> Iterator[tuple[str, bool]]:
    """Let the disk be full at each step of ``act``, for that step or from then on; yield which, and if it refused."""
    for stays in (True, False):
        for point in points:
            prepare()
            with forked(partial(filling, act, point, stays)) as child:
                code = outcome(child)
            if code == 0:
                break
            yield f"no space {'from' if stays else 'at'} step {point}", code == REFUSED


def limited(act: Act, size: int) -> None:
    """Do it where no file may grow beyond ``size`` bytes: the write itself fails, in the middle; ends the process."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    refusable(act, "", lambda: True)


def cut_writes(prepare: Act, act: Act, sizes: tuple[int, ...] = (0, 60, 200, 1000, 5000)) -> Iterator[tuple[str, bool]]:
    """Let writes of ``act`` fail in the middle of a file; yield where, and if it refused."""
    for size in sizes:
        prepare()
        with forked(partial(limited, act, size)) as child:
            code = outcome(child)
        yield f"no file beyond {size} bytes", code == REFUSED


def photographing(act: Act, folder: Path, photos: Path) -> None:
    """Do it, and leave in ``photos`` a copy of the folder as a death at each step would leave it, cut files too."""
    busy = False

    def strike(event: str, handle: int | None) -> None:
        nonlocal busy
        if busy:  # what is heard of the copying itself
            return
        busy = True
        for cut in CUTS if is_file(handle) else CUTS[:1]:
            photo = photos / f"{len(os.listdir(photos)):04d}"
            shutil.copytree(folder, photo)
            if cut is not None:
                name = Path(os.readlink(f"/proc/self/fd/{handle}")).relative_to(folder.resolve())
                os.truncate(photo / name, int(cut * (photo / name).stat().st_size))
        busy = False

    before_each_step(strike)
    act()


def photographed(act: Act, folder: Path, photos: Path) -> list[Path]:
    """The disk as it would be after a death at each step of ``act``, and at its end; ``act`` runs once, in a child."""
    photos.mkdir()
    with forked(partial(photographing, act, folder, photos)) as child:
        assert outcome(child) == 0
    shutil.copytree(folder, photos / f"{len(os.listdir(photos)):04d}")
    return sorted(photos.iterdir())


def is_file(handle: int | None) -> bool:
    return handle is not None and stat.S_ISREG(os.fstat(handle).st_mode)
