"""Damage to a folder, drawn by Hypothesis: plain numbers, which the folder's content makes definite.

A :class:`Plan` is one to three changes, and whether every digest is computed anew afterwards, so that what stands
behind the digests is reached too. The same plan does the same to the same folder.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import pickle
import random
import shutil
import stat
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

BOMB = "boom"
"""Name of the folder, beside the damaged one, that is there if pickled code was run."""

TOP = 2**16 - 1


@dataclass(frozen=True)
class Mutation:
    """One change.

    Attributes:
        change: name of it in :data:`CHANGES`.
        file: which of the files that it can be done to, counted round.
        place: where in the file, of 2**16 parts; or which entry, counted round.
        value: what is put there.
    """

    change: str
    file: int
    place: int
    value: int


@dataclass(frozen=True)
class Plan:
    """What is done to a copy of one of the folders of a kind.

    Attributes:
        folder: which, counted round.
        mutations: in order.
        sealed_again: compute all digests anew afterwards.
        reader: which of the kind's readers, counted round.
    """

    folder: int
    mutations: tuple[Mutation, ...]
    sealed_again: bool
    reader: int


class Bomb:
    """Its pickle makes a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


OFTEN = {"json_replace": 6, "json_nudge": 3, "json_remove": 2, "tensor_values": 6, "array_file": 4, "flip_bit": 2}
"""Changes that are drawn more often than the rest, since they can go wrong in the most ways."""

Change = Callable[[Path, Mutation, Path], str | None]
CHANGES: dict[str, Change] = {}


def change(function: Change) -> Change:
    """Register a change: of a folder, as drawn, with another folder of the kind at hand; None where it has no object.

    It returns what it did, in words.
    """
    CHANGES[function.__name__] = function
    return function


def plans(folder: Path) -> st.SearchStrategy[Plan]:
    """All plans for folders of a kind, such as ``folder``: tensors are changed where there are any."""
    there = {path.suffix for path in files_of(folder)}
    names = [
        name
        for name in sorted(CHANGES)
        for _ in range(OFTEN.get(name, 1))
        if not name.startswith(("tensor", "array")) or (".npy" if name.startswith("array") else ".safetensors") in there
    ]
    mutation = st.builds(_mutation, st.sampled_from(names), st.integers(0, 2**24 - 1))
    mutations = st.one_of(st.tuples(mutation), st.lists(mutation, min_size=1, max_size=3).map(tuple))
    return st.builds(_plan, mutations, st.integers(0, 2**24 - 1))


def _mutation(change: str, number: int) -> Mutation:
    """Hypothesis likes to draw the same number in several places: here they follow from one, independently."""
    draw = random.Random(number)
    return Mutation(change, draw.randrange(256), draw.randrange(TOP + 1), draw.randrange(TOP + 1))


def _plan(mutations: tuple[Mutation, ...], number: int) -> Plan:
    draw = random.Random(number)
    return Plan(draw.randrange(256), mutations, draw.random() < 0.5, draw.randrange(256))


def apply(plan: Plan, folder: Path, donor: Path) -> list[str]:
    """Damage ``folder``; returns what was done, in words."""
    done = [CHANGES[mutation.change](folder, mutation, donor) for mutation in plan.mutations]
    if plan.sealed_again:
        seal(folder)
    return [text for text in done if text is not None]


# --- choosing ----------------------------------------------------------------------------------------------------


def regular(path: Path) -> bool:
    """Whether a path is a file itself, so that reading it ends."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def files_of(folder: Path, suffix: str = "") -> list[Path]:
    """The regular files below a folder, sorted; links are not followed."""
    found = [Path(at) / name for at, _, names in os.walk(folder) for name in names if name.endswith(suffix)]
    return sorted(path for path in found if regular(path))


def _file(folder: Path, mutation: Mutation, suffix: str = "") -> Path | None:
    found = files_of(folder, suffix)
    return found[mutation.file % len(found)] if found else None


def _other(folder: Path, path: Path, mutation: Mutation) -> Path | None:
    """Another file, of the same type where there is one."""
    found = [other for other in files_of(folder, path.suffix) or files_of(folder) if other != path]
    return found[mutation.value % len(found)] if found else None


def _at(size: int, mutation: Mutation) -> int:
    return size * mutation.place // (TOP + 1)


def _put(path: Path, content: bytes) -> None:
    """Write a file of its own: a copy may be a hard link."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _said(folder: Path, path: Path, what: str) -> str:
    return f"{path.relative_to(folder)}: {what}"


# --- bytes -------------------------------------------------------------------------------------------------------


def _bytes(name: str, edit: Callable[[bytes, int, int], tuple[bytes, str]]) -> None:
    def act(folder: Path, mutation: Mutation, donor: Path) -> str | None:
        path = _file(folder, mutation)
        if path is None:
            return None
        content = path.read_bytes()
        after, what = edit(content, _at(len(content), mutation), mutation.value)
        _put(path, after)
        return _said(folder, path, what)

    CHANGES[name] = act


_bytes(
    "flip_bit",
    lambda old, at, value: (
        old[:at] + bytes([old[at] ^ (1 << value % 8)]) + old[at + 1 :] if old else old,
        f"bit {value % 8} of byte {at} flipped",
    ),
)
_bytes("insert_bytes", lambda old, at, value: (old[:at] + value.to_bytes(2, "big") + old[at:], f"2 bytes put at {at}"))
_bytes(
    "delete_bytes",
    lambda old, at, value: (old[:at] + old[at + 1 + value % 64 :], f"{1 + value % 64} bytes from {at} cut out"),
)
_bytes("truncate", lambda old, at, value: (old[:at], f"cut off at {at} of {len(old)}"))
_bytes(
    "zero_bytes",
    lambda old, at, value: (
        old[:at] + bytes(len(old[at : at + 1 + value % 512])) + old[at + 1 + value % 512 :],
        f"{1 + value % 512} bytes from {at} zeroed",
    ),
)
_bytes("empty_file", lambda old, at, value: (b"", "emptied"))
_bytes("append_bytes", lambda old, at, value: (old + value.to_bytes(2, "big"), "2 bytes appended"))


# --- JSON --------------------------------------------------------------------------------------------------------

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 7, 10**6, 2**31, 2**63, -(2**63), 2**64, 10**30, 10**5000),
    *(0.5, -0.0, 3.7, 1e-300, 1e308, math.inf, -math.inf, math.nan),
    *("", "x", "0", "1e3", "task-000", "../../x", "/etc/passwd", "\x00", "\ud800", "٣", "a\nb", "\x1b[2J", "é" * 3000),
    *("auto", "cosine", "bottleneck", "nearest_key", "file:///dev/zero", "hf:nowhere", "[bold]"),
    *([], {}, [[]], [None], [0], [1, 1], {"type": "x"}, {"": 0}, {"schema_version": 1}, [[["x"] * 3] * 3] * 3),
)
DOCUMENTS = (
    *(b"", b"null", b"[]", b"{}", b"3", b'"x"', b"NaN", b'{"a": 1, "a": 2}', b"\xff\xfe{", b"\xef\xbb\xbf{}"),
    *(
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"schema_version": 1}',
        b'{"schema_version": 99}',
        b"// no\n{}",
        b"\x80\x04.",
    ),
)


def _spots(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of every value in a JSON document, but of the whole."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in items:
        yield (*path, key)
        yield from _spots(entry, (*path, key))


def _json(name: str, edit: Callable[[Any, Any, int], str]) -> None:
    """Register an edit of (what holds the value, its key or place, drawn number), in place."""

    def act(folder: Path, mutation: Mutation, donor: Path) -> str | None:
        path = _file(folder, mutation, ".json")
        if path is None:
            return None
        try:
            content = json.loads(path.read_bytes())
            spots = list(_spots(content))
        except (ValueError, RecursionError):  # damaged by the mutation before
            return None
        if not spots:
            return None
        spot = spots[mutation.place % len(spots)]
        holder = content
        for key in spot[:-1]:
            holder = holder[key]
        what = edit(holder, spot[-1], mutation.value)
        with _any_digits():
            _put(path, json.dumps(content, indent=1).encode())
        return _said(folder, path, f"{'.'.join(map(str, spot))} {what}")

    CHANGES[name] = act


class _any_digits:
    """Python refuses to print integers of very many digits unless told otherwise."""

    def __enter__(self) -> None:
        self.before = sys.get_int_max_str_digits()
        sys.set_int_max_str_digits(0)

    def __exit__(self, *failure: object) -> None:
        sys.set_int_max_str_digits(self.before)


def _replace(holder: Any, key: Any, value: int) -> str:
    new = copy.deepcopy(VALUES[value % len(VALUES)])
    holder[key] = new
    with _any_digits():
        return f"= {json.dumps(new)[:60]}"


def _remove(holder: Any, key: Any, value: int) -> str:
    del holder[key]
    return "removed"


def _repeat(holder: Any, key: Any, value: int) -> str:
    if isinstance(holder, list):
        holder.insert(value % (len(holder) + 1), copy.deepcopy(holder[key]))
    else:
        holder[f"{key}{value % 10}"] = copy.deepcopy(holder[key])
    return "repeated"


def _nest(holder: Any, key: Any, value: int) -> str:
    depth = (1, 2, 40, 400)[value % 4]
    for _ in range(depth):
        holder[key] = [holder[key]] if value % 8 < 4 else {"type": holder[key]}
    return f"nested {depth} deep"


def _nudge(holder: Any, key: Any, value: int) -> str:
    """A near value, well-formed where a number or text is."""
    old = holder[key]
    if isinstance(old, bool) or old is None:
        holder[key] = not old
    elif isinstance(old, int):
        holder[key] = old + (1, -1, 2, 100)[value % 4]
    elif isinstance(old, float):
        holder[key] = old * (1.0 + 2**-20, -1.0, 2.0, 1e6)[value % 4]
    elif isinstance(old, str):
        holder[key] = (old + "x", old[:-1], old.swapcase(), old + "\n")[value % 4]
    elif isinstance(old, list):
        holder[key] = old[::-1]
    else:
        holder[key] = dict(reversed(old.items()))
    return "nudged"


def _exchange(holder: Any, key: Any, value: int) -> str:
    keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    other = keys[value % len(keys)]
    holder[key], holder[other] = holder[other], holder[key]
    return f"exchanged with {other}"


_json("json_replace", _replace)
_json("json_remove", _remove)
_json("json_repeat", _repeat)
_json("json_nest", _nest)
_json("json_nudge", _nudge)
_json("json_exchange", _exchange)


@change
def json_document(folder: Path, mutation: Mutation, donor: Path) -> str | None:
    """Another document altogether."""
    path = _file(folder, mutation, ".json")
    if path is None:
        return None
    content = DOCUMENTS[mutation.value % len(DOCUMENTS)]
    _put(path, content)
    return _said(folder, path, f"is {content[:20]!r}")


@change
def json_key_twice(folder: Path, mutation: Mutation, donor: Path) -> str | None:
    """The first key of the object once more at its beginning, with another value; the last one counts in Python."""
    path = _file(folder, mutation, ".json")
    content = b"" if path is None else path.read_bytes()
    if path is None or not content.startswith(b"{\n"):
        return None
    key = content.partition(b'"')[2].partition(b'"')[0]
    _put(path, b'{"' + key + b'": "first",' + content[1:])
    return _said(folder, path, f"{key!r} is there twice")


# --- files -------------------------------------------------------------------------------------------------------

STRAY = (
    *(".lock", "x.json", "model.json", "tasks/002", "tasks/1old", "tasks/0.5/row.json", "tasks/²/row.json"),
    *("adapters/9999.safetensors", "adapters/0001.safetensors", "backend/x.npy", "whitening.npy", "statistics/x"),
    *("parts/x.safetensors", "knowledge/x.safetensors", ".manifest.json.tmp", "index/other/index.json", "\udcff"),
)


@change
def swap_files(folder: Path, mutation: Mutation, donor: Path) -> str | None:
    """Two files of the folder change places."""
    path = _file(folder, mutation)
    other = None if path is None else _other(folder, path, mutation)
    if path is None or other is None:
        return None
    one, two = path.read_bytes(), other.read_bytes()
    _put(path, two)
    _put(other, one)
    return _said(folder, path, f"swapped with {other.relative_to(folder)}")


@change
def file_of_another_folder(folder: Path, mutation: Mutation, donor: Path) -> str | None:
    """A file of another folder of the kind in its place: the one of the same name, or any of the same type."""
    path = _file(folder, mutation)
    if path is None:
        return None
    same = donor / path.relative_to(folder)
    found = [same] if regular(same) else files_of(donor, path.suffix)
    if not found:
        return None
    taken = found[mutation.value % len(found)]
    _put(path, taken.read_bytes())
    return _said(folder, path, f"is {taken.relative_to(donor)} of another folder")


@change
def rename_file(folder: Path, mutation: Mutation, donor: Path) -> str | None:
    """Another name, or in the place of another file."""
    path = _file(folder, mutation)
    other = None if path is None else _other(folder, path, mutation)
    if path is None:
        return None
    target = path.with_name(path.name + ".old") if other is None or mutation.place % 2 else other
    path.rename(target)
    return _said(folder, path, f"renamed {target.relative_to(folder)}")


@change
def delete_file(folder: Path, mutation: Mutation, donor: Path) -> str | None:
    """It is gone."""
    path = _file(folder, mutation)
    if path is None:
        return None
    path.unlink()
    return _said(folder, path, "deleted")


@change
def delete_folder(folder: Path, mutation: Mutation, donor: Path) -> str | None:
    """A folder within is gone."""
    found = sorted(path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink())
    if not found:
        return None
    path = found[mutation.file % len(found)]
    shutil.rmtree(path)
    return _said(folder, path, "deleted with all in it")


@change
def stray_file(folder: Path, mutation: Mutation, donor: Path) -> str | None:
    """A file, or folder, that nobody expects there."""
    path = folder / STRAY[mutation.value % len(STRAY)]
    if os.path.lexists(path):
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if mutation.place % 2 else path.write_bytes(b"{}")
    except OSError:  # its folder is a file by now
        return None
    return _said(folder, path, "made as a folder" if mutation.place % 2 else "made")


def _special(name: str, make: Callable[[Path, bytes], object]) -> None:
    def act(folder: Path, mutation: Mutation, donor: Path) -> str | None:
        path = _file(folder, mutation)
        if path is None:
            return None
        content = path.read_bytes()
        path.unlink()
        make(path, content)
        return _said(folder, path, f"is now a {name}")

    CHANGES[name] = act


def _link_to_copy(path: Path, content: bytes) -> None:
    outside = path.with_name(f".{path.name}.away")
    outside.write_bytes(content)
    path.symlink_to(outside)


_special("fifo", lambda path, content: os.mkfifo(path))
_special("link_loop", lambda path, content: path.symlink_to(path.name))
_special("link_to_dev_zero", lambda path, content: path.symlink_to("/dev/zero"))
_special("link_to_copy", _link_to_copy)
_special("link_nowhere", lambda path, content: path.symlink_to("nowhere"))
_special("folder_for_file", lambda path, content: path.mkdir())


@change
def stray_special(folder: Path, mutation: Mutation, donor: Path) -> str | None:
    """A pipe or a link where nothing was."""
    path = folder / STRAY[mutation.value % len(STRAY)]
    if os.path.lexists(path):
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(path) if mutation.place % 2 else path.symlink_to(path.name)
    except OSError:
        return None
    return _said(folder, path, "made as a pipe" if mutation.place % 2 else "made as a link to itself")


@change
def link_out(folder: Path, mutation: Mutation, donor: Path) -> str | None:
    """A folder within is a link to that of another folder of the kind."""
    found = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.is_symlink()]
    if not found:
        return None
    path = found[mutation.file % len(found)]
    shutil.rmtree(path)
    path.symlink_to(donor / path.name)
    return _said(folder, path, "is a link to that of another folder")


# --- tensors and arrays ------------------------------------------------------------------------------------------


@change
def pickle_for_file(folder: Path, mutation: Mutation, donor: Path) -> str | None:
    """A pickle that makes a folder when it is read."""
    path = _file(folder, mutation, (".safetensors", ".npy", "")[mutation.value % 3])
    if path is None:
        return None
    _put(path, pickle.dumps(Bomb(folder.parent / BOMB)))
    return _said(folder, path, "is a pickle")


def _array(array: Any, mutation: Mutation) -> tuple[Any, str]:
    """Another array, mostly with something wrong; the number drawn says what."""
    number, size = mutation.value % 16, max(1, array.size)
    floating = array.dtype.kind == "f"
    flat = array.reshape(-1).copy()
    if number < 4 and array.size:  # one value
        choices: tuple[Any, ...] = (math.nan, math.inf, 1e30, 0.0) if floating else (-1, 10**6, 2**62, 0)
        with np.errstate(all="ignore"):
            flat[mutation.place % size] = np.asarray(choices[number]).astype(array.dtype)
        return flat.reshape(array.shape), f"has a {choices[number]}"
    if number == 4:
        return np.full_like(
            array, math.nan if floating else -(2**31) if array.dtype.itemsize > 2 else 0
        ), "is one value"
    if number == 5:
        return array.T.copy() if array.ndim > 1 else array[None], "is transposed"
    if number == 6:
        return array[:-1] if array.ndim and len(array) else array, "has a row less"
    if number == 7:
        return np.concatenate([array, array[:1]]) if array.ndim else array[None], "has a row more"
    if number == 8:
        return flat, "is flat"
    if number == 9:
        return array.reshape(()) if array.size == 1 else array[:0] if array.ndim else array, "has no row"
    if number in (10, 11, 12, 13):
        kind = ("float64", "float16", "int32", "bool")[number - 10]
        with np.errstate(all="ignore"):
            return array.astype(kind), f"is {kind}"
    if number == 14:
        return array[::-1].copy() if array.ndim else array, "is in reverse"
    return array * np.asarray(2).astype(array.dtype) if array.dtype != bool else ~array, "is doubled"


@change
def tensor_values(folder: Path, mutation: Mutation, donor: Path) -> str | None:
    """Another tensor in the place of one."""
    return _tensors(folder, mutation, lambda tensors, name: tensors.update({name: _array(tensors[name], mutation)[0]}))


@change
def tensor_names(folder: Path, mutation: Mutation, donor: Path) -> str | None:
    """A tensor more, less, or of another name."""

    def edit(tensors: dict[str, Any], name: str) -> None:
        kept = tensors[name]
        if mutation.value % 3:
            del tensors[name]
        if mutation.value % 3 < 2:
            tensors[("x", f"{name}.more", "blocks.99.ffn/down", "means", "spread.99")[mutation.place % 5]] = kept

    return _tensors(folder, mutation, edit)


def _tensors(folder: Path, mutation: Mutation, edit: Callable[[dict[str, Any], str], object]) -> str | None:
    from safetensors import SafetensorError
    from safetensors.numpy import load, save

    path = _file(folder, mutation, ".safetensors")
    if path is None:
        return None
    try:
        tensors = dict(load(path.read_bytes()))
    except (SafetensorError, KeyError, ValueError):
        return None
    if not tensors:
        return None
    name = sorted(tensors)[mutation.place % len(tensors)]
    before = {key: (value.dtype, value.shape) for key, value in tensors.items()}
    edit(tensors, name)
    _put(path, save({key: np.ascontiguousarray(value).reshape(value.shape) for key, value in tensors.items()}))
    after = {key: (value.dtype, value.shape) for key, value in tensors.items()}
    what = f"{after[name][0]} {list(after[name][1])}" if name in after else "gone"
    return _said(
        folder, path, f"tensor {name!r} now {what}" + ("" if before.keys() == after.keys() else ", other names")
    )


@change
def array_file(folder: Path, mutation: Mutation, donor: Path) -> str | None:
    """Another array in a .npy file, or a header that lies."""
    path = _file(folder, mutation, ".npy")
    if path is None:
        return None
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError, MemoryError):  # another mutation was here before
        return None
    number = mutation.value % 24
    if number < 16:
        array, what = _array(array, mutation)
    elif number == 16:
        array, what = np.asfortranarray(np.stack([array, array])), "is stacked, in Fortran order"
    elif number == 17:
        array, what = array.astype(array.dtype.newbyteorder(">")), "is big-endian"
    elif number == 18:
        array, what = np.array([Bomb(folder.parent / BOMB)], dtype=object), "holds pickled objects"
    elif number == 19:
        array, what = np.zeros(3, [("a", "f4"), ("b", "i8")]), "holds records"
    else:
        shape = ("(1099511627776,)", "(-1,)", "(9223372036854775807, 9223372036854775807)", "(0.5,)")[number - 20]
        header = f"{{'descr': '{array.dtype.str}', 'fortran_order': False, 'shape': {shape}, }}"
        padded = header.ljust(117).encode() + b"\n"
        _put(path, b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded + array.tobytes())
        return _said(folder, path, f"says its shape is {shape}")
    path.unlink()
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=True)
    return _said(folder, path, what)


# --- digests -----------------------------------------------------------------------------------------------------


def seal(folder: Path) -> None:
    """Compute the digests of a folder anew, as one could who wants it to be believed."""
    for path in files_of(folder, ".json"):
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            continue
        if not isinstance(content, dict):
            continue
        before = copy.deepcopy(content)
        _seal_files(path.parent, content.get("files"))
        _seal_records(path.parent, content)
        if OWN in content:
            content[OWN] = own_digest(content)
        if content != before:
            with _any_digits():
                _put(path, json.dumps(content, indent=1).encode())


OWN = "sha256"
"""The key under which a JSON file has the digest of all else that it says; files of earlier releases have none."""


def own_digest(content: dict[str, Any]) -> str:
    """What should stand there."""
    rest = {key: value for key, value in content.items() if key != OWN}
    with _any_digits():
        return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _seal_files(folder: Path, files: Any) -> None:
    """``files`` of a model (name to digest) or an index (name to size and digest)."""
    for name, recorded in files.items() if isinstance(files, dict) else ():
        path = folder / name.replace("\x00", "")
        if regular(path):
            files[name] = [path.stat().st_size, _sha(path)] if isinstance(recorded, list) else _sha(path)


def _seal_records(folder: Path, content: dict[str, Any]) -> None:
    """The records of a pool, whose files are named by their digests; the card's anchor stays what it was."""
    records = content.get("records")
    for record in records if isinstance(records, list) else ():
        for part in ("adapter", "knowledge"):
            old = record.get(f"{part}_sha") if isinstance(record, dict) else None
            path = folder / ("adapters" if part == "adapter" else "knowledge") / f"{old}.safetensors"
            if isinstance(old, str) and len(old) == 64 and regular(path):
                new = _sha(path)
                path.rename(path.with_name(f"{new}.safetensors"))
                record[f"{part}_sha"] = new
