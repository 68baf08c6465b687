"""The plug-ins printed in CONTRIBUTING.md work as printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

CHECK = """
import sys
from pathlib import Path

import numpy as np
import torch
from cl_adapters import AdapterBank, AdapterModel, FrozenBackbone, Route
from cl_adapters.adapters import adapters
from cl_adapters.benchmarks.base import benchmarks
from cl_adapters.codecs import codecs, decode
from cl_adapters.index import indexes
from cl_adapters.index.backends.base import IndexBackend
from cl_adapters.merge import merges
from cl_adapters.parts import parts
from cl_adapters.predictors import predictors
from cl_adapters.strategies.base import strategies
from timm.models.vision_transformer import VisionTransformer

kinds = [(adapters, "shift"), (merges, "median"), (predictors, "first"), (strategies, "first_images"),
         (benchmarks, "greys"), (parts, "tally"), (codecs, "bf16"), (indexes, "plain")]
for registry, name in kinds:
    assert name in registry.names(), name
data = benchmarks.get("greys")().load(seed=0)
assert len(data.train) == 16 and len(data.tasks) == 2
values = [torch.tensor([1.0, 5.0]), torch.tensor([3.0, 2.0]), torch.tensor([2.0, 9.0])]
assert torch.equal(merges.get("median")(values), torch.tensor([2.0, 5.0]))

torch.manual_seed(0)
backbone = FrozenBackbone.wrap(VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2,
                                                 num_classes=0))
bank = AdapterBank(backbone, adapters.get("shift")())
x = torch.rand(3, 3, 8, 8)
for slot in range(2):
    bank.add_slot(bank.fresh(torch.Generator().manual_seed(slot)))
model = AdapterModel(backbone, bank)
plain = model.features(x, None)
assert torch.equal(model.features(x, Route.single(0)), plain)
with torch.no_grad():
    for parameter in bank.slot_parameters(1):
        parameter.copy_(torch.arange(8.0))
assert not torch.allclose(model.features(x, Route.single(1)), plain)

kind = parts.get("tally")
model.parts["tally"] = kind("pictures")
model.part("tally", kind).add(torch.tensor([0, 1, 1]), classes=2)
model.part("tally", kind).add(torch.tensor([2, 1]), classes=4)
model.add_task([0, 1, 2, 3])
model.save(sys.argv[1])
found = AdapterModel.load(sys.argv[1], backbone).part("tally", kind)
assert found.unit == "pictures"
assert torch.equal(found.counts_C, torch.tensor([1, 3, 1, 0]))

tensors = {"b/A": torch.randn(3, 5), "b/B": torch.tensor([1.0])}
packed, note = codecs.get("bf16")().encode(tensors)
assert 0 < note["error"] < 2**-8
assert all(torch.equal(value, tensors[key].bfloat16().float()) for key, value in decode(packed).items())

vectors = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)
for metric in ("ip", "l2"):
    indexes_two = [indexes.get(name).build(vectors[:20], np.arange(20), metric=metric) for name in ("plain", "exact")]
    for index in indexes_two:
        index.add(np.arange(20, 30), vectors[20:])
        index.remove(np.array([3, 25]))
    mine, oracle = (index.search(vectors, 4, np.arange(2, 28)) for index in indexes_two)
    assert np.array_equal(mine[1], oracle[1]) and np.allclose(mine[0], oracle[0], atol=1e-4)
    folder = Path(sys.argv[1] + metric)
    folder.mkdir()
    indexes_two[0].save(folder)
    again = IndexBackend.load(folder).search(vectors, 4, np.arange(2, 28))
    assert np.array_equal(again[1], mine[1])

strategy = strategies.get("first_images")(model=backbone, evaluator=None)
assert strategy.config.train_mb_size > 0
"""


def test_printed_plugins_register_and_work(repo_root: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (repo_root / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 8
    command = [sys.executable, "-c", "\n".join((*blocks, CHECK)), str(tmp_path / "model")]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
