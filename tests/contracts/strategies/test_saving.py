"""Saved models of every registered strategy: in a new process, or gone on from, they are the same bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.model.facade import AdapterModel
from cl_adapters.strategies.base import strategies

LOAD = """
import sys
from pathlib import Path
from safetensors.torch import load_file, save_file
from cl_adapters import AdapterModel

root = Path(sys.argv[1])
x = load_file(root / "x.safetensors")["x"]
logits = {}
for path in sorted((root / "models").iterdir()):
    model = AdapterModel.load(path)
    answer = model.answer(x)
    logits[path.name] = answer.logits.clone()
    logits[path.name + "/adapter"] = answer.adapter.clone()
save_file(logits, root / "logits.safetensors")
assert "avalanche" not in sys.modules and "cl_adapters.strategies" not in sys.modules
"""


@pytest.fixture(params=strategies.names())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_new_process_gives_the_same_bits(lab: Any, tmp_path: Path, repo_root: Path) -> None:
    """Every strategy, on a named backbone with local weights, loaded by name alone and without Avalanche."""
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = timm.create_model("test_vit", pretrained=False, num_classes=0, img_size=16)
    save_file({key: value.contiguous() for key, value in encoder.state_dict().items()}, tmp_path / "w.safetensors")
    wanted: dict[str, torch.Tensor] = {}
    x = lab.probe()
    for name in strategies.names():
        backbone = FrozenBackbone.load("timm:test_vit", weights=tmp_path / "w.safetensors", img_size=16)
        strategy = lab.make(name, model=backbone, class_names={7: "seven", 3: "three"})
        strategy.train(lab.benchmark("sets").train_stream)
        strategy.model.save(tmp_path / "models" / name)
        answer = strategy.model.answer(x)
        wanted |= {name: answer.logits.clone(), f"{name}/adapter": answer.adapter.clone()}
    save_file({"x": x}, tmp_path / "x.safetensors")
    environment = os.environ | {"PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOAD, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(tmp_path / "logits.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert len({str(wanted[name]) for name in strategies.names()}) == len(strategies.names()), "they do differ"


def test_going_on_from_a_save_equals_never_stopping(name: str, lab: Any, tmp_path: Path) -> None:
    """Saved and loaded after every task, with other random states around: every tensor, bit for bit."""
    whole = lab.make(name)
    whole.train(lab.benchmark("sets").train_stream)
    model: Any = None
    previous = None
    for task in range(3):
        torch.manual_seed(1000 + task)
        stream = lab.benchmark("sets").train_stream
        strategy = lab.make(name, model=model)
        strategy.recall([stream[done] for done in range(task)])
        strategy.train(stream[task])
        path = strategy.model.save(tmp_path / str(task), link_from=previous)
        model, previous = AdapterModel.load(path, FrozenBackbone.wrap(lab.vit())), path
    states = [lab.state(s) for s in (whole, strategy, lab.make(name, model=model))]
    for state in states:
        del state["rng"], state["requires_grad"]
    assert not lab.differing(states[0], states[1]), "trained on"
    assert not lab.differing(states[0], states[2]), "and loaded once more"
    assert torch.equal(model.predict(lab.probe()), whole.model.predict(lab.probe()))


def test_what_is_on_disk(name: str, lab: Any, tmp_path: Path) -> None:
    """Safetensors and strict JSON, no pickle; adapter files without the adapter's name; not the backbone's weights."""
    strategy = lab.make(name, class_names={7: "seven"})
    strategy.train(lab.benchmark("sets").train_stream)
    path = strategy.model.save(tmp_path / "model")
    files = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    assert {Path(file).suffix for file in files} == {".json", ".safetensors"}
    card = json.loads((path / "model.json").read_text())
    assert sorted([*card["files"], "model.json"]) == files
    assert card["schema_version"] == 1
    assert card["backbone"]["fingerprint"] == strategy.model.backbone.fingerprint
    assert [(row["label"], row["name"], row["task"]) for row in card["classes"]][:2] == [(3, None, 0), (7, "seven", 0)]
    for slot in range(strategy.model.num_slots):
        keys = load_file(path / f"adapters/{slot:04d}.safetensors")
        assert keys.keys() == strategy.model.bank.export(slot).keys()
    backbone = sum(p.numel() for p in strategy.model.backbone.parameters()) * 4
    assert sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) < backbone + 60_000
    again = AdapterModel.load(path, FrozenBackbone.wrap(lab.vit()))
    assert again.name_of(7) == "seven" and again.name_of(3) == "3"
    assert again.predictor == strategy.model.predictor
    assert not any(p.requires_grad for p in again.bank.parameters()) if again.bank else True


def test_loading_and_saving_leave_the_random_states(name: str, lab: Any, tmp_path: Path) -> None:
    strategy = lab.make(name)
    strategy.train(lab.benchmark("sets").train_stream[0])
    before = lab.state(strategy)
    path = strategy.model.save(tmp_path / "model")
    AdapterModel.load(path, FrozenBackbone.wrap(lab.vit()))
    assert not lab.differing(before, lab.state(strategy))
