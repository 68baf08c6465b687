"""What a model takes and what it refuses: types, shapes, numbers that are not finite, batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from cl_adapters.backbones.encode import encode
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.backbones.preprocessing import Preprocessing
from cl_adapters.errors import ClAdaptersError, ConfigError, DataError
from cl_adapters.index.index import AdapterIndex
from cl_adapters.model.facade import AdapterModel
from cl_adapters.parts.abstention import Abstention
from cl_adapters.predictors.fixed import Fixed
from tests.contracts.families import case_of
from tests.models import random_model

NOT_BATCHES = (-1, 0, 1.5, True, "3", None)


@pytest.fixture
def model(tiny_vit: Callable[..., nn.Module]) -> AdapterModel:
    """Two tasks on images [3, 16, 16]."""
    module = tiny_vit(width=16, heads=2, img_size=16, depth=2)
    backbone = FrozenBackbone.wrap(module, preprocessing=Preprocessing(input_size=(3, 16, 16)))
    made = random_model(backbone, [[0, 1], [2]])
    made.predictor = Fixed(slot=1)
    return made


@pytest.fixture
def text_model() -> AdapterModel:
    """Two tasks on token ids."""
    return random_model(case_of("BERT").backbone, [[0, 1], [2]])


def images(n: int = 5) -> Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def ways(model: AdapterModel, tmp_path: Path) -> dict[str, Callable[[Any], Any]]:
    """Everything that runs inputs through a backbone."""
    pool: Any = model.save_pool(tmp_path / "pool")
    index = AdapterIndex.build(pool)
    index.pool = SimpleNamespace(backbone=model.backbone, records=pool.records)
    return {
        "predict": lambda x: model.predict(x, batch=2),
        "answer": model.answer,
        "model": model,
        "features": model.backbone.features,
        "enter": lambda x: model.backbone.enter(x, 1),
        "query": index.query,
    }


# --- numbers that are not finite ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused_with_their_places(
    model: AdapterModel, value: float, tmp_path: Path
) -> None:
    x = images()
    x[1, 0, 3, 3] = value
    x[3] = value
    for name, run in ways(model, tmp_path).items():
        with pytest.raises(DataError, match=r"2 of 5 inputs of .* not finite .* at positions 1, 3 of the batch"):
            run(x)
        run(images()), name


def test_large_numbers_whose_sum_overflows_are_no_error(model: AdapterModel) -> None:
    x = torch.full((2, 3, 16, 16), 3e38)
    assert len(model.backbone.enter(x, 0)) == 2


def test_an_own_module_and_a_mapping_are_checked_too() -> None:
    class Own(nn.Module):
        num_features = 4

        def forward(self, x: Tensor) -> Tensor:
            return x[:, :4]

    with pytest.raises(DataError, match="1 of 2 inputs of backbone 'Own'"):
        FrozenBackbone.wrap(Own()).features(torch.tensor([[0.0] * 4, [float("nan")] * 4]))
    case = case_of("transformers ViT")
    x = torch.full((1, 3, 16, 16), torch.nan)
    for given in (x, {"pixel_values": x}):
        with pytest.raises(DataError, match="1 of 1 inputs"):
            case.backbone.features(given)


def test_texts_enter_and_go_on_with_nan_behind_their_last_token(text_model: AdapterModel) -> None:
    tokens = torch.tensor([[3, 4, 5], [6, -1, -1]])
    h = text_model.backbone.enter(tokens, 1)
    assert h.isnan().any()
    assert torch.allclose(text_model.backbone.resume(h, 1), text_model.backbone.features(tokens), atol=1e-6)


# --- types and shapes -----------------------------------------------------------------------------------------------


def test_floats_of_any_type_and_arrays_are_converted(model: AdapterModel, tmp_path: Path) -> None:
    x = images()
    reversed_view = x.numpy()[::-1]
    for name, run in ways(model, tmp_path).items():
        for given in (x.double(), x.half(), x.bfloat16(), x.numpy(), x.double().numpy(), x.numpy().astype(">f4")):
            run(given), name
        run(reversed_view)
    predict: Callable[[Any], Tensor] = model.predict
    plain = predict(x)
    assert torch.equal(predict(x.double()), plain)
    assert torch.equal(predict(x.numpy()), plain)
    assert torch.equal(predict(x.numpy().astype(">f4")), plain)
    assert torch.equal(predict(reversed_view), plain.flip(0))
    assert torch.allclose(predict(x.half()), predict(x.half().float()), atol=0)


def test_double_precision_stays_where_the_backbone_has_it(tiny_vit: Callable[..., nn.Module]) -> None:
    backbone = FrozenBackbone.wrap(tiny_vit(width=16, heads=2, img_size=16, depth=1).double())
    assert backbone.features(images().double()).dtype is torch.float64


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            images().byte(),
            r"takes images \[B, 3, 16, 16\], got \[5, 3, 16, 16\] of type uint8.*\[0, 1\].*eval_transform",
        ),
        (images().long(), r"of type int64"),
        (images().numpy().astype(np.uint8), r"of type uint8"),
        (images() > 0, r"of type bool"),
        (images()[0], r"got \[3, 16, 16\] of type float32.*x\[None\]"),
        (images()[:, :1], r"got \[5, 1, 16, 16\]"),
        (images().permute(0, 2, 3, 1), r"got \[5, 16, 16, 3\]"),
        (list(images()), r"came as a list.*torch\.stack"),
        (images().tolist(), r"came as a list"),
        (np.array([None, "x"], dtype=object), r"array of object"),
        (torch.tensor(1.0), r"one tensor with the batch first.*got a single number"),
        (None, r"got NoneType"),
        ({}, r"a mapping of inputs needs a tensor"),
    ],
)
def test_what_is_not_clear_is_refused(model: AdapterModel, given: Any, message: str, tmp_path: Path) -> None:
    for name, run in ways(model, tmp_path).items():
        if name != "query" or not isinstance(given, list | Tensor):  # a query may also be a list of features
            with pytest.raises(DataError, match=message):
                run(given)


def test_without_preprocessing_images_and_spectrograms_are_told_by_the_encoder() -> None:
    for family, shape in (("ViT", "C, H, W"), ("transformers ViT", "C, H, W"), ("transformers AST", "T, F")):
        case = case_of(family)
        x = case.inputs(2)
        assert isinstance(x, Tensor)
        for wrong in (x.byte(), x[0]):
            with pytest.raises(DataError, match=rf"\[B, {shape}\]"):
                case.backbone.features(wrong)


def test_no_input_gives_no_answer(model: AdapterModel, tmp_path: Path) -> None:
    found = model.answer(images(0))
    assert found.logits.shape == (0, 3)
    assert found.adapter.shape == found.passes.shape == (0,)
    assert found.abstained is None
    assert model.predict(images(0)).shape == (0, 3)
    assert model.backbone.features(images(0)).shape == (0, 16)
    assert ways(model, tmp_path)["query"](images(0)) == []
    model.parts["abstention"] = Abstention(0.5)
    assert model.answer(images(0)).abstained is not None


# --- token ids ------------------------------------------------------------------------------------------------------


def test_token_ids_of_every_type_of_whole_numbers(text_model: AdapterModel) -> None:
    tokens = torch.tensor([[3, 4, 5], [6, 7, -1]])
    predict: Callable[[Any], Tensor] = text_model.predict
    plain = predict(tokens)
    mask = (tokens >= 0).long()
    for given in (
        tokens.int(),
        tokens.numpy(),
        tokens.numpy().astype(np.int32),
        {"input_ids": tokens.clamp_min(0).numpy(), "attention_mask": mask.numpy()},
        {"input_ids": tokens.clamp_min(0).int(), "attention_mask": mask},
    ):
        assert torch.equal(predict(given), plain)
    assert predict(tokens[:0]).shape == (0, 3)
    for wrong in (tokens.float(), tokens.double().numpy(), {"input_ids": tokens.float()}, {"input_ids": tokens > 3}):
        with pytest.raises(DataError, match="takes token ids int64"):
            predict(wrong)
    with pytest.raises(DataError, match="'input_ids' of the inputs came as a list"):
        predict({"input_ids": [[3, 4], [5, 6]]})


# --- batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", NOT_BATCHES)
def test_a_batch_is_a_whole_number_from_one_on(model: AdapterModel, batch: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.new("RGB", (16, 16)).save(file)
    runs: list[Callable[[], Any]] = [
        lambda: model.predict(images(), batch=batch),
        lambda: model.predict_files([file, file], batch=batch),
        lambda: model.predict_files([], batch=batch),
    ]
    if batch is not None:  # None: all at once
        runs.append(lambda: encode(model.backbone, [file], batch))
    for run in runs:
        with pytest.raises(ConfigError, match=rf"batch has to be a whole number, at least 1; got {batch!r}"):
            run()


def test_a_batch_may_be_of_numpy(model: AdapterModel) -> None:
    assert model.predict(images(), batch=np.int64(2)).shape == (5, 3)  # type: ignore[arg-type]


def test_one_file_is_no_list_of_files(model: AdapterModel) -> None:
    for file in ("a.png", Path("a.png")):
        with pytest.raises(ClAdaptersError, match="a list of files is expected, got one file"):
            model.predict_files(file)  # type: ignore[arg-type]
