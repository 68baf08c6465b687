"""What every registered codec keeps: shapes, a bounded error, the same bits the second time, and smaller files."""

from __future__ import annotations

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cl_adapters.adapters.base import adapter_from, adapters
from cl_adapters.codecs import Codec, codec_from, codecs, compressed_bytes, decode, is_encoded
from cl_adapters.codecs.base import HEADER
from cl_adapters.codecs.int8 import Int8
from cl_adapters.codecs.onebit import OneBit
from cl_adapters.codecs.packing import pack_positions, unpack_positions
from cl_adapters.codecs.ternary import Ternary
from cl_adapters.errors import ClAdaptersError, ConfigError, StorageError, UnknownName
from cl_adapters.sites.sites import Site, Tap

Named = dict[str, Tensor]
CODECS: list[Codec] = [codecs.get(name)() for name in codecs.names()]
CODECS += [OneBit(per="row"), Ternary(density=1.0), Ternary(density=0.01), Ternary(alpha=2.0)]


@pytest.fixture(params=CODECS, ids=str)
def codec(request: pytest.FixtureRequest) -> Codec:
    chosen: Codec = request.param
    return chosen


def drawn(seed: int = 0) -> Named:
    """The tensors of a bottleneck adapter, of very different sizes, and what is odd: a number, a row of zeros."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"b.1.ffn/up": (32, 4), "b.0.ffn/down": (4, 32), "b.0.ffn/bias": (32,), "b.0.ffn/conv": (2, 2, 3, 3)}
    tensors = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    tensors["b.1.ffn/up"] *= 1e-3
    tensors["b.0.ffn/down"][1] = 0
    return tensors | {"b.0.ffn/scale": torch.tensor([0.3]), "b.0.ffn/zero": torch.zeros(3, 5), "n": torch.tensor(2.0)}


def test_is_a_frozen_dataclass_of_options(codec: Codec) -> None:
    cls: Any = type(codec)
    assert vars(cls)["__dataclass_params__"].frozen
    assert all(field.kw_only for field in dataclasses.fields(cls))
    assert cls.__doc__
    assert cls.summary
    name = codecs.name_of(codec)
    options = {field.name: getattr(codec, field.name) for field in dataclasses.fields(cls)}
    assert codec_from({"type": name, **options}) == codec
    assert codec_from(name) == cls()


def test_round_trip_through_a_file(codec: Codec, tmp_path: Path) -> None:
    tensors = drawn()
    kept = {key: value.clone() for key, value in tensors.items()}
    packed, note = codec.encode(tensors)
    assert all(torch.equal(tensors[key], kept[key]) for key in kept), "inputs are not written"
    assert json.loads(json.dumps(note)) == note
    save_file(packed, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_size == note["bytes"] == compressed_bytes(packed)
    read = load_file(tmp_path / "a.safetensors")
    assert is_encoded(read)
    assert not is_encoded(tensors)
    found = decode(read)
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in tensors.items()}
    assert all(value.dtype == torch.float32 for value in found.values())
    lost = sum(float((found[key] - tensors[key]).square().sum()) for key in tensors)
    size = sum(float(value.square().sum()) for value in tensors.values())
    assert note["error"] == pytest.approx((lost / size) ** 0.5, rel=1e-4)
    assert note["error"] < 1
    shuffled = dict(sorted(tensors.items(), reverse=True))
    assert all(torch.equal(codec.encode(shuffled)[0][key], packed[key]) for key in packed), "order of names"


def test_coding_a_decoded_adapter_again_gives_the_same_bits(codec: Codec) -> None:
    """Except with ComPEFT's scale, which is not that of its own result."""
    if codec == Ternary(alpha=2.0):
        pytest.skip("its scale is a multiple of the standard deviation, which coding changes")
    for scale in (1.0, 1e-30, 1e-42, 1e-43):
        packed, _ = codec.encode({key: value * scale for key, value in drawn().items()})
        again, note = codec.encode(decode(packed))
        assert all(torch.equal(again[key], packed[key]) for key in packed)
        assert note["error"] == 0


def test_scales_of_int8_come_back() -> None:
    """(127 s) / 127 is not s for every float32, but for every s that is itself an m / 127."""
    m = torch.arange(1, 2**13).div(2**13).add(1)
    assert torch.equal(m / 127 * 127 / 127, m / 127)
    packed, _ = Int8().encode({"x": torch.randn(500, 501, generator=torch.Generator().manual_seed(0))})
    again, _ = Int8().encode(decode(packed))
    assert torch.equal(again["scales"], packed["scales"])
    assert torch.equal(again["values"], packed["values"])


def test_the_difference_to_a_base(codec: Codec) -> None:
    """A step from one adapter to the next is smaller than either, and so is the error."""
    base = drawn(1)
    tensors = {key: base[key] + 0.01 * value for key, value in drawn().items()}
    packed, note = codec.encode(tensors, base)
    found = decode(packed, base)
    alone, _ = codec.encode({key: tensors[key] - base[key] for key in tensors})
    assert all(torch.equal(found[key], base[key] + value) for key, value in decode(alone).items())
    assert note["error"] <= codec.encode(tensors)[1]["error"] * 1.01
    with pytest.raises(ClAdaptersError, match="pass that one as base"):
        decode(packed)
    with pytest.raises(ClAdaptersError, match="the base is not the adapter"):
        decode(packed, drawn(2))
    with pytest.raises(ClAdaptersError, match="the base does not fit the adapter: 'n'"):
        codec.encode(tensors, {key: value for key, value in base.items() if key != "n"})


def test_vectors_only_and_a_single_number(codec: Codec) -> None:
    for tensors in ({"v": torch.tensor([0.5, -2.0])}, {"n": torch.tensor(-0.25)}, {"m": torch.tensor([[4.0]])}):
        found = decode(codec.encode(tensors)[0])
        assert list(found) == list(tensors)
        if codec != Ternary(alpha=2.0):  # the standard deviation of one number is 0
            assert all(torch.allclose(found[key], value, rtol=5e-3, atol=8e-3) for key, value in tensors.items())


SIZES = {"fp16": 0.55, "int8": 0.32, "onebit": 0.09, "ternary": 0.08}
"""Upper bounds of the file's share of the float32 file, for every adapter type with matrices."""


@pytest.mark.parametrize("kind", adapters.names())
@pytest.mark.parametrize("name", codecs.names())
def test_every_adapter_type_gets_smaller(name: str, kind: str) -> None:
    """As in a ViT-tiny: 12 blocks of width 192."""
    adapter, here = adapter_from(kind), Tap("here", "out")
    site = Site("ffn", 0, "x", 192, here, here, heads=3)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"blocks.{block}.ffn/{key}": torch.randn(shape, generator=generator)
        for block in range(12)
        for key, shape in adapter.shapes(site).items()
    }
    note = codec_from(name).encode(tensors)[1]
    assert note["original_bytes"] == compressed_bytes(tensors)
    matrices = any(value.ndim > 1 for value in tensors.values())  # vectors are kept as fp16 at the least
    assert note["bytes"] < SIZES[name if matrices else "fp16"] * note["original_bytes"], note


def matrix(seed: int = 0) -> Tensor:
    return torch.randn(40, 30, generator=torch.Generator().manual_seed(seed)).pow(3)


def coded(codec: Codec, x: Tensor) -> Tensor:
    return decode(codec.encode({"x": x})[0])["x"]


def test_error_of_fp16() -> None:
    x = matrix() * 10.0 ** torch.arange(30).div(3).neg()
    assert ((coded(codec_from("fp16"), x) - x).abs() <= 2.0**-11 * x.abs() + 2.0**-25).all()
    with pytest.raises(ClAdaptersError, match=r"'x' has numbers beyond 65504.*use codec 'int8'"):
        coded(codec_from("fp16"), x + 65505)
    assert coded(codec_from("int8"), x + 65505).isfinite().all()


@pytest.mark.parametrize("x", [matrix(), matrix().T.contiguous(), matrix()[0], matrix().reshape(10, 4, 5, 6)])
def test_error_of_int8(x: Tensor) -> None:
    """At most half a step of the row, a vector being one, and a high matrix lying on its side."""
    rows = x.flatten(1) if x.ndim > 1 else x[None]
    found = coded(Int8(), x).reshape(rows.shape)
    if len(rows) > rows.shape[1]:
        rows, found = rows.T, found.T
    step = rows.abs().amax(1, keepdim=True) / 127
    assert ((found - rows).abs() <= step * 0.5001).all()
    assert (found - rows).abs().max() > 0


@pytest.mark.parametrize("per", ["tensor", "row"])
def test_error_of_onebit(per: Any) -> None:
    """||x - s sign(x)||^2 = ||x||^2 - n s^2 in every group, and no other scale is nearer."""
    x = matrix()
    found = coded(OneBit(per=per), x)
    assert torch.equal(found.sign(), x.sign())
    groups, coded_groups = (x, found) if per == "row" else (x.reshape(1, -1), found.reshape(1, -1))
    for one, back in zip(groups, coded_groups, strict=True):
        scale = float(one.abs().mean())
        assert torch.allclose(back.abs(), torch.full_like(back, scale))
        lost = float((one - back).square().sum())
        assert lost == pytest.approx(float(one.square().sum()) - len(one) * scale**2, rel=1e-4)
        assert all(lost < float((one - back * factor).square().sum()) for factor in (0.9, 1.1))


@pytest.mark.parametrize("density", [0.05, 0.3])
def test_error_of_ternary(density: float) -> None:
    x = matrix()
    found = coded(Ternary(density=density), x)
    kept = found != 0
    count = round(density * x.numel())
    assert int(kept.sum()) == count
    assert x[kept].abs().min() >= x[~kept].abs().max()
    scale = float(x[kept].abs().mean())
    assert torch.allclose(found[kept], scale * x[kept].sign())
    lost = float((x - found).square().sum())
    assert lost == pytest.approx(float(x.square().sum()) - count * scale**2, rel=1e-4)


def test_the_scale_of_compeft() -> None:
    x = matrix()
    found = coded(Ternary(density=0.2, alpha=1.5), x)
    assert found.abs().max().item() == pytest.approx(1.5 * x.std(correction=0).item(), rel=1e-5)


@pytest.mark.parametrize(("count", "total"), [(0, 7), (1, 1), (1, 1000), (5, 5), (37, 1000), (900, 1000)])
def test_positions(count: int, total: int) -> None:
    positions = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:count].sort().values
    packed = pack_positions(positions, total)
    assert torch.equal(unpack_positions(packed, count, total), positions)
    bits = 8 * sum(len(value) for value in packed.values())
    assert bits <= count * (2 + max(0, total // max(count, 1)).bit_length()) + 24


def test_what_cannot_be_encoded() -> None:
    with pytest.raises(UnknownName, match="unknown codec 'int9'; did you mean 'int8'"):
        codec_from("int9")
    with pytest.raises(ConfigError, match=r"codec\.densty; did you mean 'density'"):
        codec_from({"type": "ternary", "densty": 0.1})
    for options in ({"density": 0.0}, {"density": 1.5}, {"alpha": 0.0}):
        with pytest.raises(ConfigError, match=r"must be in \(0, 1\]|must be positive"):
            codec_from({"type": "ternary", **options})
    for wrong in (torch.tensor([1, 2]), torch.zeros(0), torch.tensor([float("nan")])):
        with pytest.raises(ClAdaptersError, match="tensor 'x' cannot be compressed"):
            Int8().encode({"x": wrong})


def test_damaged_files_are_told(codec: Codec) -> None:
    """Every packed tensor missing, shorter or of another type; nothing but StorageError."""
    packed, _ = codec.encode(drawn())
    for key in packed:
        for wrong in (None, packed[key][:-1], packed[key].double()):
            damaged = {name: value for name, value in packed.items() if name != key}
            if wrong is not None and not torch.equal(wrong, packed[key]):
                damaged[key] = wrong
            elif wrong is not None:
                damaged[key] = wrong.to(torch.int16)
            with pytest.raises(StorageError):
                decode(damaged)
    with pytest.raises(StorageError, match="no encoded adapter"):
        decode(drawn())


def forged(content: Any) -> Tensor:
    return torch.frombuffer(bytearray(zlib.compress(json.dumps(content).encode())), dtype=torch.uint8)


@pytest.mark.parametrize(
    "change",
    [
        {"shapes": {"x": [2**40]}},
        {"shapes": {"x": [2**20, 2**20]}},
        {"shapes": {"x": [-1]}},
        {"shapes": {"x": [1.5]}},
        {"shapes": {"x": 3}},
        {"shapes": []},
        {"shapes": {}},
        {"version": 99},
        {"options": []},
        {"codec": 3},
    ],
)
def test_forged_descriptions(change: dict[str, Any]) -> None:
    """Huge declared sizes allocate nothing."""
    packed, _ = Ternary().encode({"x": matrix()})
    honest = json.loads(zlib.decompress(packed[HEADER].numpy().tobytes()))
    with pytest.raises(StorageError):
        decode(packed | {HEADER: forged(honest | change)})


def test_sizes_that_the_rest_of_the_file_does_not_contradict() -> None:
    """Nothing kept takes as few bits of 2^40 numbers as of twelve."""
    packed, _ = Ternary().encode({"x": torch.zeros(3, 4)})
    honest = json.loads(zlib.decompress(packed[HEADER].numpy().tobytes()))
    with pytest.raises(StorageError, match="names more than 268435456 numbers"):
        decode(packed | {HEADER: forged(honest | {"shapes": {"x": [2**20, 2**20]}})})


def test_a_description_that_unpacks_to_a_flood() -> None:
    packed, _ = Ternary().encode({"x": matrix()})
    bomb = torch.frombuffer(bytearray(zlib.compress(b" " * 2**26, 9)), dtype=torch.uint8)
    with pytest.raises(StorageError, match="description is damaged"):
        decode(packed | {HEADER: bomb})


def test_bits_out_of_range() -> None:
    packed, _ = Ternary(density=0.1).encode({"x": matrix()})
    for key in ("high", "count"):
        flipped = packed[key].clone()
        flipped[0] = flipped[0] ^ 64
        with pytest.raises(StorageError, match="damaged"):
            decode(packed | {key: flipped})
    with pytest.raises(StorageError, match="positions out of order"):  # two of the same high part
        decode(packed | {"low": torch.zeros_like(packed["low"])})
