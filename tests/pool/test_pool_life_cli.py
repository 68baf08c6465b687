"""The life of an adapter from the command line: run, create, merge, compress, forget, exchange."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from cl_adapters.adapters.bottleneck import Bottleneck
from cl_adapters.adapters.lora import LoRA
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.backbones.preprocessing import Preprocessing
from cl_adapters.bank.bank import AdapterBank, Route
from cl_adapters.benchmarks.base import ImageSet
from cl_adapters.benchmarks.cli.root import app
from cl_adapters.errors import ClAdaptersError, ConfigError, PoolError, StorageError, UnknownName
from cl_adapters.index.index import AdapterIndex
from cl_adapters.merge.adapters import merge_adapters
from cl_adapters.model.facade import AdapterModel
from cl_adapters.pool import AdapterPool, PoolClass
from cl_adapters.pool.merging import merge_records
from cl_adapters.predictors.nearest_key import NearestKey

NAMES = tuple(f"class{label}" for label in range(6))


def call(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, list(map(str, words)))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six classes of noisy pictures, a tiny backbone, a run with keys and LoRA, and its pool."""
    root = tmp_path_factory.mktemp("life")
    torch.manual_seed(0)
    state = timm.create_model("test_vit", pretrained=False).state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, root / "w.safetensors")
    draw = np.random.default_rng(0)
    for name in NAMES:
        (root / "photos" / name).mkdir(parents=True)
        base = draw.integers(0, 256, (16, 16, 3))
        for i in range(10):
            noisy = np.clip(base + draw.normal(0, 20, base.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(root / "photos" / name / f"{i}.png")
    call(*run_words(root), "--keys", "prototypes", "--out", root / "run")
    call("pool", "create", root / "pool", "--run", root / "run", "--tag", "photos")
    return root


def run_words(root: Path) -> list[object]:
    quick = ("train_epochs=1", "train_mb_size=16", "alignment.epochs=1", "adapter.type=lora", "adapter.rank=2")
    return [
        *("run", "--strategy", "mos", "--benchmark", f"folder:{root / 'photos'}", "--backbone", "timm:test_vit"),
        *("--weights", root / "w.safetensors", "--set", "img_size=32", "--set", "benchmark.tasks=3"),
        *(word for one in quick for word in ("--set", one)),
    ]


@pytest.fixture
def pool(place: Path, tmp_path: Path) -> AdapterPool:
    """A copy to change."""
    shutil.copytree(place / "pool", tmp_path / "pool")
    return AdapterPool.open(tmp_path / "pool")


def content(pool: AdapterPool) -> dict[str, bytes]:
    return {str(path.relative_to(pool.path)): path.read_bytes() for path in pool.path.rglob("*") if path.is_file()}


# --- run and create ------------------------------------------------------------------------------------------------


def test_a_run_with_keys_becomes_a_pool(place: Path, tmp_path: Path) -> None:
    recorded = json.loads((place / "run" / "config.json").read_text(encoding="utf-8"))["experiment"]
    assert recorded["keys"]["kind"] == "prototypes"
    pool = AdapterPool.open(place / "pool")
    assert pool.ids == ("task-000", "task-001", "task-002")
    row = json.loads((place / "run" / "tasks" / "002" / "row.json").read_text(encoding="utf-8"))
    for task, record in enumerate(pool.records):
        assert record.benchmark == "folder", "no path of this machine"
        assert record.tags == ("photos",)
        assert record.metrics == {"accuracy": row["accuracy"][task]}
        assert all(known.name == NAMES[known.label] for known in record.classes)
        assert len(pool.knowledge(record.id)["keys"]) == 2
    x = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = AdapterModel.load(place / "run" / "tasks" / "002" / "model")
    assert torch.allclose(AdapterModel.from_pool(pool).predict(x), model.predict(x), atol=1e-6)
    call("pool", "create", tmp_path / "early", "--run", place / "run", "--task", 0, "--compress", "fp16")
    early = AdapterPool.open(tmp_path / "early")
    assert [record.compression for record in early.records] == ["fp16"]
    with pytest.raises(StorageError, match="has 3 complete tasks, numbered from 0; asked for task 3"):
        call("pool", "create", tmp_path / "late", "--run", place / "run", "--task", 3)
    with pytest.raises(StorageError, match="exists already"):
        call("pool", "create", tmp_path / "early", "--run", place / "run")


def test_keys_are_resumed_and_old_runs_have_none(place: Path, tmp_path: Path) -> None:
    words = run_words(place)
    shutil.copytree(place / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "tasks" / "002")
    call("resume", tmp_path / "run")
    for name in ("parts/class_keys.safetensors", "heads.safetensors"):
        files = [root / "tasks" / "002" / "model" / name for root in (place / "run", tmp_path / "run")]
        assert not files[0].exists() or files[0].read_bytes() == files[1].read_bytes(), name
    call("pool", "create", tmp_path / "pool", "--run", tmp_path / "run")
    pools = [AdapterPool.open(root / "pool") for root in (place, tmp_path)]
    assert [record.knowledge_sha for record in pools[0].records] == [r.knowledge_sha for r in pools[1].records]
    call(*words, "--out", tmp_path / "plain")
    config = tmp_path / "plain" / "config.json"
    assert "keys" not in json.loads(config.read_text(encoding="utf-8"))["experiment"]
    shutil.rmtree(tmp_path / "plain" / "tasks" / "002")
    call("resume", tmp_path / "plain")
    assert "without keys" in call("pool", "create", tmp_path / "bare", "--run", tmp_path / "plain")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keys", "prototype"], "keys.kind"),
        (["--set", "keys.per_clas=3"], "did you mean 'per_class'"),
        (["--keys", "prototypes", "--set", "keys.per_class=3"], "per_class"),
    ],
)
def test_bad_keys(place: Path, tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call(*run_words(place), *words, "--out", tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_options_of_keys(place: Path, tmp_path: Path) -> None:
    call(*run_words(place), "--keys", "features", "--set", "keys.per_class=3", "--out", tmp_path / "run")
    recorded = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))["experiment"]["keys"]
    assert (recorded["kind"], recorded["per_class"]) == ("features", 3)


# --- merge ---------------------------------------------------------------------------------------------------------


def test_merge(place: Path, pool: AdapterPool) -> None:
    before = content(pool)
    words = ["pool", "merge", pool.path, "task-000", "task-002", "--id", "both", "--tag", "merged"]
    words += ["--benchmark", f"folder:{place / 'photos'}"]
    shown = json.loads(call(*words, "--dry-run", "--json"))
    assert content(pool) == before, "a dry run writes nothing"
    assert shown["written"] is False
    text = call(*words)
    record = pool.get("both")
    assert record.parents == ("task-000", "task-002")
    assert record.tags == ("merged",)
    assert record.merge is not None
    assert record.merge["method"] == "mean"
    assert record.labels == (*pool.get("task-000").labels, *pool.get("task-002").labels)
    assert set(pool.ids) == {"task-000", "task-001", "task-002", "both"}, "the parents stay"
    lora = LoRA(rank=2)
    expected = merge_adapters([pool.tensors("task-000"), pool.tensors("task-002")], lora, "mean")
    found = pool.tensors("both")
    assert all(torch.equal(found[key], value) for key, value in expected.tensors.items())
    assert f"truncation lost {expected.report.error:.2e}" in text
    assert expected.report.error > 0
    parts = [pool.knowledge(id) for id in ("task-000", "task-002")]
    joined = pool.knowledge("both")
    for key in ("keys", "head.weight", "head.bias", "prototypes", "held_out"):
        assert torch.equal(joined[key], torch.cat([part[key] for part in parts])), key
    assert joined["key_class"].tolist() == [0, 1, 2, 3]
    # the accuracy is that of the two models, by a rule that both can follow
    accuracy = shown["accuracy"]
    assert accuracy["samples"] == 4 * 2, "two test images of each of four classes"
    assert accuracy["predictor"] == "nearest_key"
    assert accuracy["before"] == right(pool, ["task-000", "task-002"], place)
    assert accuracy["after"] == right(pool, ["both"], place) == record.metrics["accuracy"]
    assert f"accuracy {accuracy['before']:.2f} % -> {accuracy['after']:.2f} %" in text
    assert pool.verify().ok
    index = AdapterIndex.build(pool, tags=["merged"])
    assert index.records == ("both",)


def test_the_accuracy_after_a_merge_is_that_of_the_merged(place: Path, pool: AdapterPool) -> None:
    """A merge that ruins the adapter shows."""
    words = ["pool", "merge", pool.path, "task-000", "task-002", "--id", "bad", "--json"]
    words += ["--benchmark", f"folder:{place / 'photos'}", "--method", "task_arithmetic", "--set", "scale=-1000"]
    accuracy = json.loads(call(*words))["accuracy"]
    assert accuracy["before"] == right(pool, ["task-000", "task-002"], place)
    assert accuracy["after"] == right(pool, ["bad"], place)
    assert accuracy["after"] != accuracy["before"]


def right(pool: AdapterPool, ids: list[str], place: Path) -> float:
    """Percent right on the test images of the records' classes, the long way."""
    from cl_adapters.benchmarks.spec import parse_benchmark

    data = parse_benchmark(f"folder:{place / 'photos'}", {})[1].load(0)
    model = AdapterModel.from_pool(pool, ids, predictor=NearestKey())
    assert isinstance(model.backbone.preprocessing, Preprocessing)
    assert isinstance(data.test, ImageSet)
    transform = model.backbone.preprocessing.eval_transform()
    chosen = [place for place, label in enumerate(data.test.labels) if label in model.classes]
    images = torch.stack([transform(Image.fromarray(np.asarray(data.test.images[place]))) for place in chosen])
    found = model.predict(images)
    answers = found if found.ndim == 1 else torch.tensor(model.classes)[found.argmax(1)]
    return 100 * int((answers == torch.tensor(data.test.labels[chosen])).sum()) / len(chosen)


def test_merge_says_what_was_not_measured(pool: AdapterPool) -> None:
    words = ["pool", "merge", pool.path, "task-000", "task-001", "--dry-run", "--id"]
    assert "accuracy not measured: benchmark 'folder' needs its path" in call(*words, "a")
    assert "give --benchmark" in call(*words, "a")
    assert "accuracy not measured: --no-accuracy" in call(*words, "a", "--no-accuracy")
    with pytest.raises(UnknownName, match="digits"):
        call(*words, "a", "--benchmark", "digit")
    with pytest.raises(
        ConfigError, match="is 'class. in the pool, but '.' in benchmark 'digits'".replace("class.", "class.'")
    ):
        call(*words, "a", "--benchmark", "digits")


def test_merge_by_weights_rank_and_options(pool: AdapterPool) -> None:
    words = ["pool", "merge", pool.path, "task-000", "task-001", "--no-accuracy", "--id"]
    call(*words, "a", "--method", "weighted", "--weights", "0.75,0.25", "--rank", 4)
    assert pool.get("a").adapter == (pool.get("task-000").adapter or {}) | {"rank": 4}
    assert merge_of(pool, "a")["error"] < 1e-6, "rank 2 + 2 loses nothing"
    call(*words, "b", "--method", "weighted", "--weights", "accuracy", "--compress", "fp16")
    metrics = [pool.get(id).metrics["accuracy"] for id in ("task-000", "task-001")]
    assert merge_of(pool, "b")["options"] == {"metrics": metrics}
    assert pool.get("b").compression == "fp16"
    call(*words, "c", "--method", "ties", "--set", "density=0.5", "--base", "task-002")
    assert pool.get("c").parents == ("task-000", "task-001", "task-002")
    assert merge_of(pool, "c")["base"] == "task-002"
    for more, message in (
        (["--method", "weighted", "--weights", "f1"], "recorded: accuracy"),
        (["--weights", "1,1"], "has no option 'metrics'"),
        (["--method", "tie"], "did you mean 'ties'"),
        (["--set", "density=2", "--method", "ties"], "density must be in"),
    ):
        with pytest.raises(ClAdaptersError, match=message):
            call(*words, "d", *more)
    with pytest.raises(ConfigError, match="already"):
        call("pool", "merge", pool.path, "task-000", "task-001", "--id", "task-002")
    with pytest.raises(PoolError, match="two or more different"):
        call("pool", "merge", pool.path, "task-000", "task-000", "--id", "d")
    assert set(pool.ids) == {"task-000", "task-001", "task-002", "a", "b", "c"}


def merge_of(pool: AdapterPool, id: str) -> dict[str, Any]:
    found = pool.get(id).merge
    assert found is not None
    return found


def bottlenecks(path: Path, parents: dict[str, list[str]]) -> AdapterPool:
    """Adapters without a delta, of the digits' classes, with these parents."""
    backbone = FrozenBackbone.load("vit_glyph_tiny")
    pool = AdapterPool.create(path, backbone)
    adapter = Bottleneck(bottleneck=2)
    for number, (id, before) in enumerate(parents.items()):
        draw = torch.Generator().manual_seed(number)
        fresh = AdapterBank(backbone, adapter).fresh(draw)
        rows = torch.randn(2, backbone.num_features, generator=draw)
        pool.add(
            {key: 0.1 * torch.randn(value.shape, generator=draw) for key, value in fresh.items()},
            adapter,
            [PoolClass(label=2 * number + i, name=str(2 * number + i)) for i in range(2)],
            id=id,
            parents=before,
            benchmark="digits",
            knowledge={
                "keys": rows,
                "key_class": torch.arange(2),
                "head.weight": rows,
                "head.bias": torch.zeros(2),
            },
        )
    return pool


def test_without_a_delta_only_one_lineage_is_merged(tmp_path: Path) -> None:
    pool = bottlenecks(tmp_path / "pool", {"a": [], "b": ["a"], "c": ["a"], "d": []})
    before = content(pool)
    with pytest.raises(ConfigError, match="are no linear maps: trained apart"):
        call("pool", "merge", pool.path, "a", "d", "--id", "new", "--no-accuracy")
    assert content(pool) == before
    pool.remove("a")  # b and c still name it
    done = json.loads(call("pool", "merge", pool.path, "b", "c", "--id", "new", "--json", "--limit", 2))
    assert done["report"]["space"] == "tensors"
    assert done["accuracy"]["samples"] == 4 * 2, "the records' benchmark is taken when none is given"
    assert done["accuracy"]["benchmark"] == "digits"
    name = next(iter(pool.tensors("new")))
    assert torch.allclose(pool.tensors("new")[name], (pool.tensors("b")[name] + pool.tensors("c")[name]) / 2)


def test_classes_of_several_parents_and_missing_rows(pool: AdapterPool) -> None:
    """A class twice keeps both keys and the mean of its rows; what one parent lacks is left out and named."""
    parent = pool.get("task-000")
    rows = pool.knowledge(parent.id)
    flipped = {key: value.flip(0) if key in ("head.weight", "head.bias") else value for key, value in rows.items()}
    adapter = LoRA(rank=2)
    swapped = {**flipped, "key_class": 1 - rows["key_class"], "held_out_class": 1 - rows["held_out_class"]}
    pool.add(pool.tensors("task-001"), adapter, parent.classes[::-1], id="twin", knowledge=swapped)
    pool.add(pool.tensors("task-001"), adapter, [PoolClass(label=90)], id="bare")
    done = merge_records(pool, ["task-000", "twin"], id="same")
    assert done.record.labels == parent.labels
    assert done.record.benchmark is None, "not the same in both"
    found = pool.knowledge("same")
    assert torch.allclose(found["head.weight"], rows["head.weight"])
    assert torch.equal(found["keys"], torch.cat([rows["keys"], rows["keys"]]))
    assert torch.equal(found["key_class"], torch.cat([rows["key_class"], rows["key_class"]]))
    done = merge_records(pool, ["task-000", "bare"], id="half")
    assert pool.knowledge("half") == {}
    assert "keys left out: bare has none" in done.notes
    assert done.notes[-1] == "without keys the index cannot find the merged adapter"
    pool.add(pool.tensors("task-001"), adapter, [PoolClass(label=parent.labels[0], name="other")], id="wrong")
    with pytest.raises(PoolError, match="not of one benchmark"):
        merge_records(pool, ["task-000", "wrong"], id="no")


# --- compress ------------------------------------------------------------------------------------------------------


def test_compress(place: Path, pool: AdapterPool, tmp_path: Path) -> None:
    before, full = content(pool), {id: pool.tensors(id) for id in pool.ids}
    words = ["pool", "compress", pool.path, "--codec", "int8", "--benchmark", f"folder:{place / 'photos'}"]
    dry = json.loads(call(*words, "--dry-run", "--json"))
    assert content(pool) == before
    text = call(*words, "--to", tmp_path / "small")
    assert content(pool) == before
    small = AdapterPool.open(tmp_path / "small")
    assert [record.compression for record in small.records] == ["int8"] * 3
    for row, id in zip(dry["adapters"], small.ids, strict=True):
        lost = sum((small.tensors(id)[key] - full[id][key]).square().sum() for key in full[id])
        size = sum(value.square().sum() for value in full[id].values())
        assert row["error"] == pytest.approx(float(lost / size) ** 0.5, rel=1e-4)
        assert 0 < row["error"] < 0.01
        assert row["before"] == len(before[pool.get(id).files[0]])
        assert row["after"] == (small.path / small.get(id).files[0]).stat().st_size < row["before"]
        assert small.get(id).knowledge_sha == pool.get(id).knowledge_sha
    accuracy = dry["accuracy"]
    assert (accuracy["samples"], accuracy["predictor"]) == (12, "self_refine")
    assert f"accuracy {accuracy['before']:.2f} % -> {accuracy['after']:.2f} %" in text
    call("pool", "compress", pool.path, "task-000", "--codec", "ternary", "--set", "density=0.3", "--no-accuracy")
    assert [record.compression for record in pool.records] == ["ternary", None, None]
    assert json.loads((pool.path / "model.json").read_text())["anchor"] == [
        "task-000",
        pool.get("task-000").adapter_sha,
    ]
    pool.rename("task-000", "first")
    AdapterModel.from_pool(pool)  # finds the predictor's own adapter by its new content
    assert pool.verify().ok
    assert pool.gc() == ()


def test_compress_refusals(pool: AdapterPool, tmp_path: Path) -> None:
    before = content(pool)
    for words, message in (
        (["--codec", "int9"], "did you mean 'int8'"),
        (["--codec", "ternary", "--set", "densit=0.3"], "did you mean 'density'"),
        (["--codec", "fp16", "task-00"], "unknown adapter 'task-00'"),
        (["--codec", "fp16", "--no-accuracy", "--to", str(pool.path)], "exists already"),
    ):
        with pytest.raises(ClAdaptersError, match=message):
            call("pool", "compress", pool.path, *words)
    assert content(pool) == before


def test_a_pool_with_a_merged_adapter_is_compressed(place: Path, pool: AdapterPool) -> None:
    """No one model has a class twice: then the adapters that are compressed are asked alone."""
    merge_records(pool, ["task-001", "task-002"], id="both")
    words = ["pool", "compress", pool.path, "--codec", "fp16", "--benchmark", f"folder:{place / 'photos'}", "--dry-run"]
    assert json.loads(call(*words, "both", "--json"))["accuracy"]["samples"] == 8
    with pytest.raises(PoolError, match="choose one of them"):
        call(*words)


# --- forget, exchange ----------------------------------------------------------------------------------------------


def test_forget(pool: AdapterPool) -> None:
    call("index", "build", pool.path)
    label = pool.get("task-001").labels[0]
    text = call("pool", "forget", pool.path, "--label", label)
    assert f"removed class {label} of adapter 'task-001'" in text
    assert "entries of index 'default'" in text
    done = json.loads(call("pool", "forget", pool.path, "task-002", "--json"))
    assert any("adapter 'task-002'" in line for line in done["removed"])
    assert any("threshold" in line or "aligned" in line for line in done["cannot_undo"])
    assert pool.ids == ("task-000", "task-001")
    for words in ([], ["task-000", "--label", "0"]):
        with pytest.raises(ConfigError, match="name an adapter to forget"):
            call("pool", "forget", pool.path, *words)


def test_peft_there_and_back(pool: AdapterPool, tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft", reason="needs peft: pip install cl-adapters[test]")
    text = call("pool", "export", pool.path, "task-001", tmp_path / "peft", "--format", "peft")
    assert "PEFT has no place for classes" in text
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    backbone = pool.backbone
    ours = under(backbone, LoRA(rank=2), pool.tensors("task-001"), x)
    encoder = copy.deepcopy(backbone.encoder)
    model = peft.PeftModel.from_pretrained(encoder, tmp_path / "peft").eval()
    model.save_pretrained(tmp_path / "again")
    text = call(
        *("pool", "import", pool.path, tmp_path / "again", "--id", "back", "--like", "task-000", "--tag", "foreign"),
        *("--class", "90=ninety", "--class", "91"),
    )
    assert "the index cannot find it" in text
    record = pool.get("back")
    assert record.adapter == pool.get("task-001").adapter
    assert record.classes == (PoolClass(label=90, name="ninety"), PoolClass(label=91))
    assert record.tags == ("foreign",)
    found = under(backbone, LoRA(rank=2), pool.tensors("back"), x)
    with torch.no_grad():
        assert not torch.allclose(ours, backbone(x), atol=1e-4), "the adapter changes something"
    assert torch.allclose(found, ours, atol=1e-5)
    for words, error in (
        (["--class", "x"], "whole number"),
        (["--like", "no"], "unknown adapter"),
        (["--id", "back"], "back"),
    ):
        with pytest.raises(ClAdaptersError, match=error):
            call("pool", "import", pool.path, tmp_path / "again", *words)
    call("pool", "export", pool.path, "task-001", tmp_path / "own")
    with pytest.raises(ConfigError, match="says itself what it holds"):
        call("pool", "import", pool.path, tmp_path / "own", "--class", "1", "--id", "x")
    with pytest.raises(UnknownName, match="did you mean 'peft'"):
        call("pool", "export", pool.path, "task-001", tmp_path / "no", "--format", "pefd")


def under(backbone: FrozenBackbone, adapter: LoRA, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    bank = AdapterBank(backbone, adapter)
    with torch.no_grad(), bank.route(Route.single(bank.add_slot(tensors))):
        found: Tensor = backbone(x)
    return found
