"""``cifar100``: CIFAR-100 from its official binary archive, downloaded once.

torchvision's own loader unpickles what it downloads; the binary version holds the same images as plain bytes.
"""

from __future__ import annotations

import socket
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from cl_adapters.benchmarks.base import (
    Augmentation,
    BenchmarkConfig,
    BenchmarkData,
    ImageSet,
    arrival_order,
    benchmarks,
    split_evenly,
)
from cl_adapters.errors import DataError

URL = "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
ARCHIVE = "cifar-100-binary.tar.gz"
MD5 = "03b5dce01913d631647c71ecec9e9cb8"
NUM_TRAIN, NUM_TEST, NUM_CLASSES = 50_000, 10_000, 100
SIDE = 32
DOWNLOAD_TIMEOUT_S = 30.0


@benchmarks.register("cifar100")
@dataclass(frozen=True, kw_only=True)
class CIFAR100(BenchmarkConfig):
    """CIFAR-100: 50,000 training and 10,000 test images, 32 x 32, 100 classes.

    Attributes:
        root: folder of the archive; it is downloaded there (169 MB) when it is not there yet.
        tasks: number of tasks.
        order_seed: seed of the class order; 1993 is that of the class-incremental literature, None the run's seed.
        augmentation: training-time augmentation.
    """

    summary: ClassVar[str] = "CIFAR-100, 60,000 photographs (32x32), 100 classes; downloads 169 MB once"

    root: str = "~/.cache/cl-adapters/cifar100"
    tasks: int = 20
    order_seed: int | None = 1993
    augmentation: Augmentation = field(default_factory=Augmentation)

    def load(self, seed: int) -> BenchmarkData:
        """Return CIFAR-100; ``seed`` is only used where ``order_seed`` is None.

        Raises:
            ConfigError: more tasks than classes.
            DataError: the archive cannot be downloaded, or is not the expected one.
        """
        task_sizes = split_evenly(NUM_CLASSES, self.tasks)
        classes, train, test = _read_archive(_fetch(Path(self.root).expanduser()), NUM_TRAIN, NUM_TEST, NUM_CLASSES)
        return BenchmarkData(
            name="cifar100",
            classes=classes,
            class_order=arrival_order(NUM_CLASSES, seed if self.order_seed is None else self.order_seed),
            task_sizes=task_sizes,
            licence="none stated by its authors (A. Krizhevsky 2009); https://www.cs.toronto.edu/~kriz/cifar.html",
            train=train,
            test=test,
            augmentation=self.augmentation,
        )


def _fetch(root: Path) -> Path:
    """Return the verified archive under ``root``, downloading it first if need be."""
    from torchvision.datasets import utils  # slow to import, and only needed here

    archive = root / ARCHIVE
    if utils.check_integrity(archive, MD5):
        return archive
    damaged = f" The file that lies there is damaged: its MD5 is not {MD5}." if archive.is_file() else ""
    # torchvision sets no time limit, and behind a firewall that drops packets the system's own is minutes.
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
    try:
        utils.download_url(URL, root, ARCHIVE, MD5)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"cifar100: the download of {URL} failed ({error}).{damaged} Without a network, get that file elsewhere "
            f"and put it at {archive} (or set root to its folder); own images work offline with folder:PATH"
        ) from error
    finally:
        socket.setdefaulttimeout(previous)
    return archive


def _read_archive(
    archive: Path, num_train: int, num_test: int, num_classes: int
) -> tuple[tuple[str, ...], ImageSet, ImageSet]:
    """Return class names, train and test of an archive in the layout of the binary version.

    Raises:
        DataError: other counts than asked for, or a member is missing.
    """
    try:
        with tarfile.open(archive, "r:gz") as tar:
            names = _member(tar, "fine_label_names.txt").decode("ascii").split()
            train, test = _member(tar, "train.bin"), _member(tar, "test.bin")
    except (tarfile.TarError, KeyError, EOFError, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{archive}: not the binary version of CIFAR-100 ({error}); expected {URL}") from error
    if len(names) != num_classes or len(set(names)) != num_classes:
        raise DataError(f"{archive}: expected {num_classes} class names, found {len(set(names))}")
    return (
        tuple(names),
        _read_records(train, num_train, num_classes, f"{archive}: train.bin"),
        _read_records(test, num_test, num_classes, f"{archive}: test.bin"),
    )


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    content = tar.extractfile(f"cifar-100-binary/{name}")
    if content is None:
        raise KeyError(f"{name} is not a file")
    return content.read()


def _read_records(content: bytes, count: int, num_classes: int, where: str) -> ImageSet:
    """Decode records of 1 byte coarse label, 1 byte fine label, 3 planes (R, G, B) of 32 x 32 bytes."""
    size = 2 + 3 * SIDE * SIDE
    if len(content) != count * size:
        raise DataError(f"{where}: expected {count} records of {size} bytes, found {len(content)} bytes")
    records: npt.NDArray[np.uint8] = np.frombuffer(content, dtype=np.uint8).reshape(count, size)
    labels = records[:, 1].astype(np.int64)
    per_class = np.bincount(labels, minlength=num_classes)
    if len(per_class) != num_classes or per_class.min() != per_class.max():
        raise DataError(f"{where}: expected {count // num_classes} images of each of {num_classes} classes")
    planes = records[:, 2:].reshape(count, 3, SIDE, SIDE)
    return ImageSet(np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels)
