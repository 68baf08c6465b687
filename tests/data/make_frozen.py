"""Writes ``tests/data/frozen``: folders that later releases have to read, and what was found in them when new.

    python tests/data/make_frozen.py NEW_FOLDER

Only commands and names that users have are used, so that any release can run it; ``README.md`` there says which one
did.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from cl_adapters import AdapterIndex, AdapterModel, AdapterPool
from cl_adapters.benchmarks.cli.root import app
from cl_adapters.predictors import predictors

IMAGES = 16
"""The first so many test images of digits."""

MODELS = ("mos", "sema", "ranpac", "lae")
METHODS = ("retrieve", "o_lora")
TASKS = {
    "mood": [
        ("the film was good", "yes"),
        ("the film was great", "yes"),
        ("the film was bad", "no"),
        ("a dull film", "no"),
    ],
    "colour": [("the colour of sky", "blue"), ("the colour of grass", "green"), ("the colour of fire", "red")],
    "numbers": [("count one two", "three"), ("count two three", "four"), ("count before two", "one")],
}
SETTINGS: dict[str, Sequence[str]] = {
    "mos": (
        *("train_epochs=1", "lr=0.1", "blocks=[5]", "adapter.bottleneck=2", "covariance=diagonal"),
        *("alignment.epochs=1", "keys.per_class=2", "keys.held_out=0.03"),
    ),
    "sema": (
        *("benchmark.tasks=2", "train_epochs=1", "adapter.bottleneck=2", "blocks=[4,5]", "last_blocks=2"),
        *("threshold=0.01", "descriptor_dim=4", "descriptor_epochs=1", "buffer=20", "cached_views=1"),
    ),
    "ranpac": (
        *("benchmark.tasks=2", "train_epochs=1", "lr=0.1", "blocks=[5]", "adapter.bottleneck=2"),
        "projection=48",
    ),
    "lae": ("benchmark.tasks=2", "train_epochs=1", "adapter.type=lora", "adapter.rank=2", "blocks=[5]"),
}


def machine() -> dict[str, str]:
    """What the last bits of a sum depend on."""
    processor = platform.processor()
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    capability = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "capability": capability, "processor": processor}


def call(*words: str | Path) -> None:
    """Run ``cl-adapters`` in this process."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    if done.exception is not None or done.exit_code:
        raise RuntimeError(f"cl-adapters {' '.join(map(str, words))}: {done.output}") from done.exception


def observe(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the models, the pool and the index in ``folder`` answer: numbers as tensors, the rest as plain values."""
    files = sorted((folder / "images").glob("*.png"))
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for name in MODELS:
        _answers(AdapterModel.load(folder / name), files, name, tensors, plain)
    pool = AdapterPool.open(folder / "pool")
    checked = pool.verify()
    plain["pool"] = {
        "ok": checked.ok,
        "orphans": list(checked.orphans),
        "ids": list(pool.ids),
        "labels": [list(record.labels) for record in pool.records],
        "tags": [list(record.tags) for record in pool.records],
        "parents": [list(record.parents) for record in pool.records],
        "compression": [record.compression for record in pool.records],
    }
    _answers(AdapterModel.from_pool(pool), files, "pool-model", tensors, plain)
    some = [record.id for record in pool.records][1::2]
    nearest = predictors.get("nearest_key")()
    _answers(AdapterModel.from_pool(pool, some, predictor=nearest), files, "pool-some", tensors, plain)
    found = AdapterModel.from_pool(pool, predictor=nearest, index="default")
    _answers(found, files, "pool-index", tensors, plain)
    index = AdapterIndex.open(None, pool)
    hits = index.query(prepared(found, files), 3)
    assert index.threshold is not None
    tensors["index/scores"] = torch.tensor([[hit.score for hit in row] for row in hits])
    tensors["index/threshold"] = torch.tensor([index.threshold])
    plain["index"] = {
        "keys": len(index),
        "records": [[hit.record for hit in row] for row in hits],
        "labels": [[hit.label for hit in row] for row in hits],
        "names": [[hit.name for hit in row] for row in hits],
    }
    return tensors, plain


def prepared(model: AdapterModel, files: Sequence[Path]) -> Tensor:
    """Images as the backbone takes them, float32 [B, 3, H, W]."""
    transform: Any = model.backbone.preprocessing
    return torch.stack([transform.eval_transform()(Image.open(file).convert("RGB")) for file in files])


def _answers(
    model: AdapterModel, files: Sequence[Path], name: str, tensors: dict[str, Tensor], plain: dict[str, Any]
) -> None:
    answers = model.predict_files(files)
    tensors[f"{name}/logits"] = model.predict(prepared(model, files))
    plain[name] = {
        "classes": list(model.classes),
        "parts": sorted(model.parts),
        "adapters": model.num_slots,
        "labels": [answer.label for answer in answers],
        "answered_by": [answer.adapter for answer in answers],
        "abstained": [answer.abstained for answer in answers],
    }


def measured(run: Path) -> dict[str, Any]:
    """What a run's file says of accuracy, of images or of instructions, and all tensors that it saved last."""
    last = max((run / "tasks").iterdir()) / "model"
    digest = hashlib.sha256()
    for path in sorted(last.rglob("*.safetensors")):
        digest.update(path.relative_to(last).as_posix().encode() + path.read_bytes())
    if (run / "results.json").is_file():
        found = _json(run / "results.json")
        matrices = {"accuracy": found["accuracy_matrix"]}
    else:
        found = _json(run / "instruct.json")
        matrices = {way: found[way]["accuracy_matrix"] for way in ("likelihood", "generation")}
    return {"matrices": matrices, "tensors_sha": digest.hexdigest()}


def main(folder: Path) -> None:
    """Make everything."""
    torch.set_num_threads(1)
    (folder / "images").mkdir(parents=True)
    folder = folder.resolve()
    _save_images(folder / "images")
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place).resolve()
        runs = {f"run-{name}": _vision(name, scratch / name) for name in MODELS}
        for name in MODELS:
            last = max((scratch / name / "tasks").iterdir())
            shutil.copytree(last / "model", folder / name)
        pool = folder / "pool"
        call("pool", "create", pool, "--run", scratch / "mos", "--tag", "digits")
        call("pool", "compress", pool, "task-003", "--codec", "int8")
        call("index", "build", pool, "--false-reject", "0.1")
        _interrupt(scratch / "mos", folder / "run-mos", tasks=2)
        _save_decoder(folder / "decoder")
        _save_tasks(folder / "tasks")
        for name in METHODS:
            runs[f"instruct-{name}"] = _instruct(name, folder, scratch / f"instruct-{name}")
            _interrupt(scratch / f"instruct-{name}", folder / f"instruct-{name}", tasks=1)
    for path in [*folder.rglob(".lock")]:
        path.unlink()
    for path in folder.rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        if str(folder) in text:  # such names are absolute in every run; here they are those of any checkout
            path.write_text(text.replace(f"{folder}/", ""), encoding="utf-8")
    tensors, plain = observe(folder)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "expected.safetensors")
    expected = {"machine": machine(), "runs": {k: v for k, v in runs.items() if (folder / k).is_dir()}, "found": plain}
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")


def _vision(name: str, out: Path) -> dict[str, Any]:
    words = ["run", "--strategy", name, "--benchmark", "digits", "--seed", "0", "--out", str(out), "--threads", "1"]
    words += ["--keys", "features"] if name == "mos" else []
    call(*words, *(word for pair in SETTINGS[name] for word in ("--set", pair)))
    return measured(out)


def _instruct(method: str, folder: Path, out: Path) -> dict[str, Any]:
    words = ["instruct", "--model", f"hf:{folder / 'decoder'}", "--data", str(folder / "tasks"), "--method", method]
    words += ["--out", str(out), "--order", ",".join(TASKS)]
    for pair in ("epochs=12", "batch=2", "lr=0.02", "adapter.targets=[query, value, up, down]", "max_new_tokens=4"):
        words += ["--set", pair]
    call(*words)
    return measured(out)


def _interrupt(run: Path, out: Path, tasks: int) -> None:
    """Copy a run as it lies there when its process was killed after so many tasks."""
    (out / "tasks").mkdir(parents=True)
    shutil.copy(run / "config.json", out)
    for path in sorted((run / "tasks").iterdir())[:tasks]:
        shutil.copytree(path, out / "tasks" / path.name)


def _save_images(folder: Path) -> None:
    from cl_adapters.benchmarks.data.digits import Digits

    test: Any = Digits().load(0).test
    for number, image in enumerate(test.images[:IMAGES]):
        Image.fromarray(image).save(folder / f"{number:02d}.png")


def _save_tasks(folder: Path) -> None:
    folder.mkdir()
    for name, rows in TASKS.items():
        choices = sorted({answer for _, answer in rows})
        lines = [json.dumps({"prompt": prompt, "answer": answer, "choices": choices}) for prompt, answer in rows]
        for split in ("train", "test"):
            (folder / f"{name}.{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _save_decoder(folder: Path) -> None:
    """A Llama of random weights with a tokenizer of words."""
    import tokenizers
    import transformers

    words = sorted({word for rows in TASKS.values() for row in rows for text in row for word in text.split()})
    vocabulary = {word: place for place, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", *words])}
    tool = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tool.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tool.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    wrapped: Any = transformers.PreTrainedTokenizerFast
    wrapped(
        tokenizer_object=tool, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)


def _json(path: Path) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


if __name__ == "__main__":
    main(Path(sys.argv[1]))
