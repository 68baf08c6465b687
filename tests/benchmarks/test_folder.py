"""Own images in folders: both layouts, the deterministic split, and every way in which a folder can be wrong."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cl_adapters.benchmarks.base import BenchmarkData, arrival_order
from cl_adapters.benchmarks.data import folder
from cl_adapters.benchmarks.data.folder import Folder
from cl_adapters.benchmarks.spec import parse_benchmark
from cl_adapters.errors import ConfigError, DataError


def write_class(path: Path, count: int, colour: int = 0, side: int = 4) -> None:
    """Write ``count`` PNGs whose first pixel is (colour, position, 0)."""
    path.mkdir(parents=True)
    for position in range(count):
        Image.new("RGB", (side, side), (colour, position, 0)).save(path / f"{position:03d}.png")


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    root = tmp_path / "pets"
    for colour, name in enumerate(("ant", "bee", "cat")):
        write_class(root / name, 10, colour)
    return root


@pytest.fixture
def divided(tmp_path: Path) -> Path:
    root = tmp_path / "divided"
    for part, count in (("train", 5), ("test", 3)):
        for colour, name in enumerate(("ant", "bee")):
            write_class(root / part / name, count, colour)
    return root


def load(root: Path, **options: object) -> BenchmarkData:
    return parse_benchmark(f"folder:{root}", {"tasks": 1, **options})[1].load(0)


def test_split_layout(pets: Path) -> None:
    data = load(pets, tasks=3)
    assert data.classes == ("ant", "bee", "cat")
    assert data.class_order == arrival_order(3, 0)
    assert np.bincount(data.train.labels).tolist() == [8, 8, 8]
    assert np.bincount(data.test.labels).tolist() == [2, 2, 2]
    assert np.asarray(data.train.images).shape == (24, 4, 4, 3)
    for part in (data.train, data.test):
        for image, label, name in zip(part.images, part.labels, part.names, strict=True):
            assert name == f"{data.classes[label]}/{image[0, 0, 1]:03d}.png"
            assert image[0, 0, 0] == label


def test_split_is_the_same_for_every_seed_and_beside_other_classes(pets: Path) -> None:
    before = load(pets)
    assert list(Folder(path=str(pets), tasks=1).load(9).test.names) == list(before.test.names)
    write_class(pets / "aardvark", 10)
    after = set(load(pets).test.names)
    assert set(before.test.names) <= after
    assert set(load(pets, test_fraction=0.5).test.names) > after, "a larger fraction only adds images"


@pytest.mark.parametrize(("fraction", "expected"), [(0.001, 1), (0.3, 3), (0.999, 9)])
def test_each_class_keeps_images_on_both_sides(pets: Path, fraction: float, expected: int) -> None:
    assert np.bincount(load(pets, test_fraction=fraction).test.labels).tolist() == [expected] * 3


def test_train_and_test_layout(divided: Path) -> None:
    data = load(divided, tasks=2)
    assert data.classes == ("ant", "bee")
    assert len(data.train) == 10
    assert len(data.test) == 6
    assert data.train.names[0] == "train/ant/000.png"
    assert data.test.names[-1] == "test/bee/002.png"


def test_val_stands_in_for_test_and_test_wins(divided: Path) -> None:
    for name in ("ant", "bee"):
        write_class(divided / "val" / name, 1)
    assert len(load(divided).test) == 6
    (divided / "test").rename(divided.parent / "away")
    assert len(load(divided).test) == 2


def test_limits_take_the_first_by_file_name(divided: Path) -> None:
    data = load(divided, max_train_per_class=2, max_test_per_class=1)
    assert list(data.train.names) == [f"train/{name}/{i:03d}.png" for name in ("ant", "bee") for i in (0, 1)]
    assert list(data.test.names) == ["test/ant/000.png", "test/bee/000.png"]


def test_one_training_image_is_enough_with_train_and_test(divided: Path) -> None:
    write_class(divided / "train" / "cat", 1)
    write_class(divided / "test" / "cat", 1)
    assert np.bincount(load(divided).train.labels).tolist() == [5, 5, 1]


def test_fixed_order(pets: Path) -> None:
    assert load(pets, order_seed=1993).class_order == arrival_order(3, 1993)


def test_order_of_the_folders_names(pets: Path) -> None:
    shuffled = next(seed for seed in range(9) if arrival_order(3, seed) != (0, 1, 2))
    data = Folder(path=str(pets), tasks=3, shuffle=False).load(shuffled)
    assert [data.classes[label] for label in data.class_order] == ["ant", "bee", "cat"]
    with pytest.raises(ConfigError, match="order_seed=1993 is of no use with shuffle=false"):
        Folder(path=str(pets), shuffle=False, order_seed=1993)


def test_several_sizes_and_modes(pets: Path) -> None:
    Image.new("L", (9, 2), 7).save(pets / "ant" / "000.png")
    Image.new("RGBA", (3, 3), (1, 2, 3, 0)).save(pets / "bee" / "000.png")
    Image.new("I;16", (2, 2), 65535).save(pets / "cat" / "000.png")
    data = load(pets, test_fraction=0.01)
    shapes = {image.shape for part in (data.train, data.test) for image in part.images}
    assert {(4, 4, 3), (2, 9, 3), (3, 3, 3), (2, 2, 3)} == shapes


def test_clutter_and_loose_files_are_ignored(pets: Path) -> None:
    (pets / "README.txt").write_text("about my pets")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (pets / "ant" / name).write_bytes(b"x")
    (pets / ".thumbnails").mkdir()
    (pets / "__MACOSX").mkdir()
    data = load(pets)
    assert data.classes == ("ant", "bee", "cat")
    assert len(data.train) + len(data.test) == 30


def test_home_folder_is_expanded(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(pets.parent))
    assert len(Folder(path="~/pets", tasks=1).load(0).train) == 24


@pytest.mark.parametrize("content", [b"not a picture", b"\x89PNG\r\n\x1a\nrubbish", b""])
def test_unreadable_file_is_an_error_that_names_it(pets: Path, content: bytes) -> None:
    (pets / "bee" / "notes.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"bee/notes\.txt: .*Remove or repair the file, or set skip_unreadable=true"):
        load(pets)


def test_unreadable_files_are_skipped_with_a_warning_on_request(pets: Path) -> None:
    whole = load(pets)
    victim = whole.train.names[3]
    (pets / victim).write_bytes((pets / victim).read_bytes()[:40])
    with pytest.warns(UserWarning, match=rf"1 unreadable train file\(s\) left out: .*{victim}"):
        data = load(pets, skip_unreadable=True)
    assert victim not in data.train.names
    assert len(data.train) == len(whole.train) - 1
    assert list(data.test.names) == list(whole.test.names)


def test_class_that_is_wholly_unreadable_is_still_an_error(divided: Path) -> None:
    for path in (divided / "train" / "bee").iterdir():
        path.write_bytes(b"x")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(DataError, match="no train image of class bee"):
            load(divided, skip_unreadable=True)


def test_single_image_cannot_be_split(pets: Path) -> None:
    write_class(pets / "dog", 1)
    with pytest.raises(DataError, match=r"class 'dog' has a single image .*000\.png.* provide train/ and test/"):
        load(pets)


def test_empty_class(pets: Path) -> None:
    (pets / "dog").mkdir()
    with pytest.raises(DataError, match=r"dog is an empty class folder; add images or remove it"):
        load(pets)


def test_nested_folders(pets: Path) -> None:
    write_class(pets / "ant" / "old", 2)
    with pytest.raises(DataError, match=r"ant is a class folder but has folders inside: old; put the images"):
        load(pets)


def test_missing_path_file_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist: expected a folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "pets.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"pets\.zip is a file; unpack it"):
        load(tmp_path / "pets.zip")
    with pytest.raises(DataError, match="has no subfolders; expected one subfolder of images per class"):
        load(tmp_path)


@pytest.mark.parametrize("part", ["train", "test"])
def test_class_in_one_part_only(divided: Path, part: str) -> None:
    write_class(divided / part / "cat", 2)
    other = "test" if part == "train" else "train"
    with pytest.raises(DataError, match=f"class only in {part}/ and not in {other}/ of .*: cat; every class"):
        load(divided)


def test_half_a_division(divided: Path) -> None:
    (divided / "test").rename(divided.parent / "away")
    with pytest.raises(DataError, match="has train/ but no test/ or val/"):
        load(divided)
    (divided / "train").rename(divided / "test")
    with pytest.raises(DataError, match="has test/ but no train/"):
        load(divided)


def test_division_with_something_else_beside_it(divided: Path) -> None:
    write_class(divided / "extra", 2)
    with pytest.raises(DataError, match="also extra/; move the rest elsewhere"):
        load(divided)


def test_train_may_be_the_name_of_a_class(pets: Path) -> None:
    write_class(pets / "train", 5)
    assert load(pets).classes == ("ant", "bee", "cat", "train")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_fraction": 0}, "test_fraction must lie between 0 and 1, got 0"),
        ({"test_fraction": 1.0}, "test_fraction must lie between 0 and 1"),
        ({"max_train_per_class": 0}, "max_train_per_class must be at least 1"),
        ({"skip_unreadable": "perhaps"}, "skip_unreadable: .*boolean"),
        ({"tasks": 4}, "tasks must be between 1 and the number of classes 3, got 4"),
        ({"task": 4}, "unknown option benchmark.task; did you mean 'tasks'"),
    ],
)
def test_bad_options(pets: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(pets, **options)


def test_progress_bar_goes_to_stderr(
    pets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(folder, "PROGRESS_FROM", 1)
    load(pets)
    assert capsys.readouterr().out == ""
