"""Features of backbones of transformers: they see no padding and no company, and come in halves."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.errors import IncompatibleBackbone
from tests.backbones.conftest import DECODERS, IMAGES, SIZES, TEXT, TEXTS, model_of, tokens_of

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("family", TEXT)
def test_features_do_not_depend_on_padding_or_company(family: str) -> None:
    encoder, lengths = model_of(*TEXT[family]), [9, 4, 1, 6]
    backbone = FrozenBackbone.wrap(encoder, pooling="last" if family in DECODERS else "mean")
    x = tokens_of(lengths, 9)
    features = backbone.features(x)
    assert features.shape == (4, 32) and features.isfinite().all()
    for side, width in (("right", 14), ("left", 9), ("left", 14), ("middle", 12)):
        assert torch.allclose(backbone.features(tokens_of(lengths, width, side)), features, atol=1e-5), (side, width)
    for row, length in enumerate(lengths):
        alone = x[row : row + 1, :length]
        assert torch.allclose(backbone.features(alone), features[row], atol=1e-5)
        hidden = encoder(input_ids=alone).last_hidden_state
        theirs = hidden[:, -1] if family in DECODERS else hidden.mean(1)
        assert torch.allclose(theirs, features[row], atol=1e-5), "what the model itself says of the text alone"
    changed = x.clone()
    changed[0, 7] = 3 if x[0, 7] != 3 else 4
    assert (backbone.features(changed)[0] - features[0]).abs().max() > 1e-3, "the last but one counts"


@pytest.mark.parametrize("family", TEXT)
def test_mappings_of_a_tokenizer_are_the_same_texts(family: str) -> None:
    backbone = FrozenBackbone.wrap(model_of(*TEXT[family]))
    x = tokens_of([5, 2], 6)
    mask = (x >= 0).long()
    given = {"input_ids": torch.where(mask == 1, x, 7), "attention_mask": mask, "token_type_ids": torch.zeros_like(x)}
    assert torch.equal(backbone.features(given), backbone.features(x))


@pytest.mark.parametrize("family", TEXT)
def test_halves_of_texts(family: str) -> None:
    backbone = FrozenBackbone.wrap(model_of(*TEXT[family]), pooling="last")
    x = tokens_of([5, 2, 4], 8, "left")
    plain = backbone.features(x)
    for block in range(backbone.depth):
        h = backbone.enter(x, block)
        assert h.shape == (3, 8, 32)
        assert (~h.isnan()).all(2).sum(1).tolist() == [5, 2, 4], "NaN where there is no token"
        assert torch.equal(backbone.resume(h, block), plain)
        assert torch.allclose(backbone.resume(h[[1, 2]], block), plain[[1, 2]], atol=1e-5), "in other company"
        later = backbone.resume(h, block, backbone.depth - 1)
        assert torch.equal(backbone.resume(later, backbone.depth - 1), plain)
    assert not any("forward" in module.__dict__ for module in backbone.modules()), "nothing is left bypassed"


@pytest.mark.parametrize("family", IMAGES)
def test_halves_of_images(family: str) -> None:
    backbone = FrozenBackbone.wrap(model_of(*IMAGES[family]), pooling="mean")
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    plain = backbone.features(x)
    for block in range(backbone.depth + 1):
        assert torch.equal(backbone.resume(backbone.enter(x, block), block), plain)


def test_an_encoder_that_goes_on_otherwise_is_refused() -> None:
    """It adds the embeddings again behind the last block: what is entered does not hold them."""

    class Again(transformers.BertModel):  # type: ignore[name-defined]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.last_hidden_state = output.last_hidden_state + self.embeddings(kwargs["input_ids"])
            return output

    model = model_of("Bert", SIZES)
    model.__class__ = Again
    backbone = FrozenBackbone.wrap(model)
    with pytest.raises(IncompatibleBackbone, match="cannot be entered at a block"):
        backbone.check_resumable()


def test_a_failed_second_half_leaves_the_encoder_as_it_was(bert: FrozenBackbone) -> None:
    x = tokens_of([5, 2], 5, first=4).clamp_max(11)
    plain, h = bert.features(x), bert.enter(x, 2)
    with pytest.raises(RuntimeError):
        bert.resume(h[..., :7], 2)
    assert bert.token_mask is None
    assert torch.equal(bert.features(x), plain)


@pytest.mark.parametrize("half", ["first", "second"])
def test_a_pass_in_another_thread_beside_a_half(half: str, bert: FrozenBackbone) -> None:
    """A half changes the encoder while it runs: nobody else may see that, so others wait."""
    x = tokens_of([5, 2], 5, first=4).clamp_max(11)
    plain, h, other = bert.features(x), bert.enter(x, 1), bert.features(x.flip(0))
    seen: list[Tensor] = []
    thread = threading.Thread(target=lambda: seen.append(bert.features(x.flip(0))), daemon=True)

    def beside(*_: Any) -> None:
        if threading.current_thread() is threading.main_thread() and thread.ident is None:
            thread.start()
            thread.join(0.2)
            assert not seen, "it waits"

    bert.encoder.get_submodule("embeddings" if half == "first" else "encoder.layer.1").register_forward_hook(beside)
    there = bert.enter(x, 1) if half == "first" else bert.resume(h, 1)
    thread.join(10)
    assert len(seen) == 1 and torch.equal(seen[0], other)
    assert torch.equal(there.nan_to_num(), h.nan_to_num() if half == "first" else plain)


@pytest.mark.parametrize("family", TEXT | IMAGES)
def test_a_second_half_costs_no_first(family: str) -> None:
    backbone = FrozenBackbone.wrap(model_of(*(TEXT | IMAGES)[family]))
    x = tokens_of([5, 2], 5) if family in TEXT else torch.zeros(2, 3, 16, 16)
    h, last = backbone.enter(x, backbone.depth - 1), backbone.depth - 1
    backbone.check_resumable()
    ran: list[int] = []
    for site in backbone.sites("ffn_parallel"):
        tap = backbone.encoder.get_submodule(site.target.module)
        tap.register_forward_pre_hook(lambda *_, block=site.block: ran.append(block))
    backbone.resume(h, last)
    assert ran == [last]
    backbone.features(x)
    assert ran == [last, *range(last + 1)]


def test_the_mask_of_the_pass_in_progress(bert: FrozenBackbone) -> None:
    seen: list[Any] = []
    bert.encoder.get_submodule("encoder.layer.1").register_forward_pre_hook(lambda *_: seen.append(bert.token_mask))
    x = tokens_of([3, 1], 6, "left", 4).clamp_max(11)
    bert.features(x)
    bert.resume(bert.enter(x, 1), 1)
    expected = [[True, True, True], [True, False, False]]
    assert [mask.tolist() for mask in seen if mask is not None][-2:] == [expected] * 2
    assert bert.token_mask is None


def test_poolings(folder: Callable[..., Path]) -> None:
    def load(pooling: Any) -> FrozenBackbone:
        return FrozenBackbone.load(f"hf:{folder('BERT')}", pooling=pooling)

    x = load(None).preprocessing.encode(TEXTS[:2])  # type: ignore[union-attr]
    hidden = load(None).encoder(input_ids=x[:1]).last_hidden_state[0]
    assert torch.allclose(load("cls").features(x)[0], hidden[0], atol=1e-5)
    assert torch.allclose(load("last").features(x)[0], hidden[-1], atol=1e-5)
    assert torch.allclose(load("mean").features(x)[0], hidden.mean(0), atol=1e-5)
    assert load("encoder").features(x).abs().max() <= 1, "its own pooler ends in a tanh"
    assert len({load(pooling).fingerprint for pooling in ("cls", "last", "mean", "encoder")}) == 4
