"""``folder``: own images, one subfolder per class.

Two layouts:

    PATH/cat/*.png  PATH/dog/*.png                           split here, the same way every time
    PATH/train/cat/*.png  PATH/test/cat/*.png  ...           split by you (val/ instead of test/ will do)

Files that lie beside the class folders, and hidden files, are ignored. Inside a class folder everything must be
an image: what is not is an error, because a class that quietly lost images gives numbers nobody can trust.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track

from cl_adapters.benchmarks.base import (
    Augmentation,
    BenchmarkConfig,
    BenchmarkData,
    ImageSet,
    arrival_order,
    benchmarks,
    split_evenly,
)
from cl_adapters.errors import ConfigError, DataError
from cl_adapters.images import decode_image

SPLIT_SEED = 20240601
PROGRESS_FROM = 2000
"""Number of images from which on decoding takes long enough for a progress bar."""

_CLUTTER = frozenset({"thumbs.db", "desktop.ini", "__macosx"})

ClassFiles = dict[str, list[Path]]


@benchmarks.register("folder")
@dataclass(frozen=True, kw_only=True)
class Folder(BenchmarkConfig):
    """Own images: one subfolder per class, or train/ and test/ with one subfolder per class each.

    Class names are the sorted names of the subfolders. Images of several sizes and modes may be mixed;
    ``cl_adapters.images`` says how each mode is read.

    Attributes:
        path: the folder.
        tasks: number of tasks that the classes are dealt into.
        test_fraction: share of each class that becomes the test set where the folder has no train/ and test/;
            at least one image, so a class then needs two. With train/ and test/ one training image is enough.
        max_train_per_class: keep only the first so many training files of each class, by file name.
        max_test_per_class: the same for test.
        shuffle: false lets the classes arrive in the order of their folders' names.
        order_seed: seed of the class order (1993: that of the literature); None takes the seed of the run.
        skip_unreadable: leave out files that cannot be read, with one warning that names them.
        augmentation: training-time augmentation. Set flip to false for characters.
    """

    argument: ClassVar[str | None] = "path"
    summary: ClassVar[str] = "own images: one subfolder per class, or train/ and test/"

    path: str
    tasks: int = 5
    test_fraction: float = 0.2
    max_train_per_class: int | None = None
    max_test_per_class: int | None = None
    shuffle: bool = True
    order_seed: int | None = None
    skip_unreadable: bool = False
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        # absolute, so that a run can be resumed from another working folder
        object.__setattr__(self, "path", str(Path(self.path).expanduser().resolve()))
        if not 0 < self.test_fraction < 1:
            raise ConfigError(f"test_fraction must lie between 0 and 1, got {self.test_fraction}")
        for name in ("max_train_per_class", "max_test_per_class"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1 (or null for all), got {value}")
        if not self.shuffle and self.order_seed is not None:
            raise ConfigError(
                f"order_seed={self.order_seed} is of no use with shuffle=false, which takes the order of the folders' "
                "names; leave one of them out"
            )

    def load(self, seed: int) -> BenchmarkData:
        """Read and decode every image once; the split never follows ``seed``.

        Raises:
            ConfigError: more tasks than classes.
            DataError: no such folder, no class folders, a class without images or in one split only, too few
                images to split, a file that is not an image.
        """
        root = Path(self.path).expanduser()
        train_files, test_files = _find_files(root, self.test_fraction)
        classes = tuple(sorted(train_files))
        task_sizes = split_evenly(len(classes), self.tasks)
        drawn = seed if self.order_seed is None else self.order_seed
        return BenchmarkData(
            name="folder",
            classes=classes,
            class_order=arrival_order(len(classes), drawn if self.shuffle else None),
            task_sizes=task_sizes,
            licence=f"own images (folder {root.resolve().name!r}); their licence is not known here",
            train=_decode(root, train_files, self.max_train_per_class, self.skip_unreadable, "train"),
            test=_decode(root, test_files, self.max_test_per_class, self.skip_unreadable, "test"),
            augmentation=self.augmentation,
        )


def _find_files(root: Path, test_fraction: float) -> tuple[ClassFiles, ClassFiles]:
    """Return the training and test files of each class."""
    if not root.is_dir():
        problem = "is a file; unpack it" if root.is_file() else "does not exist"
        raise DataError(f"{root} {problem}: expected a folder with one subfolder of images per class")
    subfolders = {path.name for path in _visible(root) if path.is_dir()}
    test = "test" if "test" in subfolders else "val" if "val" in subfolders else None
    if "train" in subfolders and test is not None:
        others = sorted(subfolders - {"train", "test", "val"})
        if others:
            raise DataError(f"{root} has train/ and {test}/ but also {', '.join(others)}/; move the rest elsewhere")
        return _both(root / "train", root / test)
    if subfolders and subfolders <= {"train", "test", "val"}:
        missing = "test/ or val/" if "train" in subfolders else "train/"
        raise DataError(
            f"{root} has {', '.join(sorted(subfolders))}/ but no {missing}: add it, or point to the folder whose "
            "subfolders are the classes"
        )
    return _split(_class_files(root), test_fraction)


def _both(train: Path, test: Path) -> tuple[ClassFiles, ClassFiles]:
    train_files, test_files = _class_files(train), _class_files(test)
    for here, there, found, other in ((train, test, train_files, test_files), (test, train, test_files, train_files)):
        lonely = sorted(found.keys() - other.keys())
        if lonely:
            raise DataError(
                f"class only in {here.name}/ and not in {there.name}/ of {here.parent}: {_some(lonely)}; "
                "every class needs images in both"
            )
    return train_files, test_files


def _class_files(folder: Path) -> ClassFiles:
    """Return the files of each class folder, sorted by name.

    Raises:
        DataError: no class folders, an empty one, or folders inside one.
    """
    files: ClassFiles = {}
    for class_folder in sorted(path for path in _visible(folder) if path.is_dir()):
        inside = sorted(_visible(class_folder))
        nested = [path.name for path in inside if path.is_dir()]
        if nested:
            raise DataError(
                f"{class_folder} is a class folder but has folders inside: {_some(nested)}; put the images of a class "
                "directly into its folder"
            )
        if not inside:
            raise DataError(f"{class_folder} is an empty class folder; add images or remove it")
        files[class_folder.name] = inside
    if not files:
        raise DataError(f"{folder} has no subfolders; expected one subfolder of images per class")
    return files


def _split(files: ClassFiles, test_fraction: float) -> tuple[ClassFiles, ClassFiles]:
    """Split each class by a draw of its own, so that adding a class never moves an image of another."""
    train: ClassFiles = {}
    test: ClassFiles = {}
    for name, members in files.items():
        if len(members) < 2:
            raise DataError(
                f"class {name!r} has a single image ({members[0]}), but one to train and one to test are needed; "
                "add images, remove the class, or provide train/ and test/ folders"
            )
        num_test = min(max(1, round(test_fraction * len(members))), len(members) - 1)
        rng = np.random.default_rng([SPLIT_SEED, zlib.crc32(name.encode("utf-8", "surrogateescape"))])
        chosen = set(rng.permutation(len(members))[:num_test].tolist())
        train[name] = [path for position, path in enumerate(members) if position not in chosen]
        test[name] = [path for position, path in enumerate(members) if position in chosen]
    return train, test


def _decode(root: Path, files: ClassFiles, limit: int | None, skip_unreadable: bool, split: str) -> ImageSet:
    wanted = [(label, path) for label, name in enumerate(sorted(files)) for path in files[name][:limit]]
    images: list[npt.NDArray[np.uint8]] = []
    kept: list[tuple[int, str]] = []
    problems: list[str] = []
    for label, path in _with_progress(wanted, f"decoding {split} images"):
        try:
            images.append(decode_image(path))
        except DataError as error:
            if not skip_unreadable:
                raise DataError(
                    f"{error}. Remove or repair the file, or set skip_unreadable=true to go on without it"
                ) from error
            problems.append(str(error))
        else:
            kept.append((label, path.relative_to(root).as_posix()))
    if problems:
        warnings.warn(f"{len(problems)} unreadable {split} file(s) left out: {_some(problems)}", stacklevel=3)
    labels = np.array([label for label, _ in kept], dtype=np.int64)
    same_size = len({image.shape for image in images}) == 1
    return ImageSet(np.stack(images) if same_size else images, labels, [name for _, name in kept])


def _with_progress(wanted: Sequence[tuple[int, Path]], what: str) -> Iterator[tuple[int, Path]]:
    return iter(track(wanted, what, console=Console(stderr=True), transient=True, disable=len(wanted) < PROGRESS_FROM))


def _visible(folder: Path) -> list[Path]:
    """Return the entries that are neither hidden nor left by an operating system."""
    try:
        entries = list(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {error.strerror}; check its permissions") from error
    return [path for path in entries if not path.name.startswith(".") and path.name.lower() not in _CLUTTER]


def _some(names: Sequence[str], limit: int = 10) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
