"""CIFAR-100's binary layout, on archives made here (noise, tiny counts), and the error without a network."""

from __future__ import annotations

import io
import tarfile
import urllib.error
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import utils

from cl_adapters.benchmarks.data import cifar100
from cl_adapters.errors import DataError

NAMES = ("apple", "bear", "cup")


def records(labels: list[int], seed: int) -> tuple[bytes, np.ndarray]:
    """Return a .bin file's bytes and its images, uint8 [N, 32, 32, 3]."""
    images = np.random.default_rng(seed).integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8)
    content = b"".join(
        bytes([19, label]) + b"".join(image[..., channel].tobytes() for channel in range(3))
        for label, image in zip(labels, images, strict=True)
    )
    return content, images


def write_archive(path: Path, **members: bytes) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"cifar-100-binary/{name.replace('__', '.')}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def whole(path: Path, train: bytes, test: bytes, names: tuple[str, ...] = NAMES) -> Path:
    return write_archive(
        path, train__bin=train, test__bin=test, fine_label_names__txt="\n".join((*names, "", "")).encode()
    )


def test_reads_planes_labels_and_names(tmp_path: Path) -> None:
    labels = [2, 0, 1, 1, 0, 2]
    (train, images), (test, test_images) = records(labels, 0), records([0, 1, 2], 1)
    classes, read_train, read_test = cifar100._read_archive(whole(tmp_path / "a.tar.gz", train, test), 6, 3, 3)
    assert classes == NAMES
    assert read_train.labels.tolist() == labels
    assert read_train.labels.dtype == np.int64
    np.testing.assert_array_equal(read_train.images, images)
    np.testing.assert_array_equal(read_test.images, test_images)


def test_other_counts_are_refused(tmp_path: Path) -> None:
    train, test = records([0, 1, 2], 0)[0], records([0, 1, 2], 1)[0]
    archive = whole(tmp_path / "a.tar.gz", train, test)
    with pytest.raises(DataError, match=r"train\.bin: expected 50000 records of 3074 bytes, found 9222 bytes"):
        cifar100._read_archive(archive, cifar100.NUM_TRAIN, cifar100.NUM_TEST, 3)
    with pytest.raises(DataError, match="expected 100 class names, found 3"):
        cifar100._read_archive(archive, 3, 3, 100)
    uneven = whole(tmp_path / "b.tar.gz", records([0, 0, 2], 0)[0], test)
    with pytest.raises(DataError, match="expected 1 images of each of 3 classes"):
        cifar100._read_archive(uneven, 3, 3, 3)


def test_missing_member_and_broken_archive(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not the binary version of CIFAR-100"):
        cifar100._read_archive(write_archive(tmp_path / "a.tar.gz", train__bin=b""), 0, 0, 3)
    broken = tmp_path / "b.tar.gz"
    broken.write_bytes(b"no archive")
    with pytest.raises(DataError, match="not the binary version of CIFAR-100"):
        cifar100._read_archive(broken, 3, 3, 3)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(utils, "download_url", unreachable)


@pytest.mark.usefixtures("no_network")
def test_offline_error_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        cifar100.CIFAR100(root=str(tmp_path)).load(0)
    message = str(caught.value)
    for part in (cifar100.URL, "failed", "no route to host", str(tmp_path / cifar100.ARCHIVE), "folder:PATH"):
        assert part in message
    assert "damaged" not in message


@pytest.mark.usefixtures("no_network")
def test_damaged_archive_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / cifar100.ARCHIVE).write_bytes(b"half a download")
    with pytest.raises(DataError, match=f"damaged: its MD5 is not {cifar100.MD5}"):
        cifar100.CIFAR100(root=str(tmp_path)).load(0)


def test_archive_in_place_is_used_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of ``load``, with the counts of a small archive instead of the official ones."""
    train, test = records([0, 1, 2] * 2, 0)[0], records([0, 1, 2], 1)[0]
    archive = whole(tmp_path / cifar100.ARCHIVE, train, test)
    monkeypatch.setattr(cifar100, "MD5", utils.calculate_md5(archive))
    for name, value in (("NUM_TRAIN", 6), ("NUM_TEST", 3), ("NUM_CLASSES", 3)):
        monkeypatch.setattr(cifar100, name, value)
    data = cifar100.CIFAR100(root=str(tmp_path), tasks=3).load(0)
    assert data.classes == NAMES
    assert len(data.train) == 6
    assert len(data.test) == 3
    assert data.class_order == tuple(np.random.RandomState(1993).permutation(3))
