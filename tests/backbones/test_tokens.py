"""Texts as one tensor: packing, masks, hidden states with NaN where there is no token; the tokenizer in front."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_adapters.backbones.text import TextPreprocessing, tokenizer_hash
from cl_adapters.backbones.tokens import from_mapping, from_rows, is_tokens, mask_of, packed, padded, unpadded
from cl_adapters.errors import ConfigError, DataError

X = -1


def test_packed_moves_tokens_to_the_left_and_cuts_what_is_empty() -> None:
    rows = [[X, 5, X, 7, X], [X, X, X, 0, X], [1, 2, X, X, X]]
    assert packed(torch.tensor(rows)).tolist() == [[5, 7], [0, X], [1, 2]]


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_leaves_no_trace(side: str) -> None:
    plain = torch.tensor([[3, 1, 4, 1], [5, 9, X, X], [2, X, X, X]])
    wide = torch.full((3, 9), X)
    for row, tokens in enumerate(plain):
        tokens = tokens[tokens >= 0]
        start = {"left": 9 - len(tokens), "right": 0, "both": 2}[side]
        wide[row, start : start + len(tokens)] = tokens
    assert torch.equal(packed(wide), plain)
    assert torch.equal(packed(plain), plain)


def test_packed_rows_without_tokens_and_batches_without_rows() -> None:
    assert packed(torch.tensor([[X, X], [X, 3]])).tolist() == [[X], [3]]
    assert packed(torch.full((2, 3), X)).shape == (2, 0)
    assert packed(torch.empty(0, 4, dtype=torch.long)).shape == (0, 0)


def test_what_a_tokenizer_gives() -> None:
    ids, mask = torch.tensor([[7, 8, 0], [9, 0, 0]], dtype=torch.int32), torch.tensor([[1, 1, 0], [1, 0, 0]])
    tokens = from_mapping({"input_ids": ids, "attention_mask": mask})
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [[7, 8, X], [9, X, X]]
    assert from_mapping({"input_ids": ids}).tolist() == ids.tolist(), "0 is a token where no mask says otherwise"
    assert mask_of(tokens).tolist() == mask.bool().tolist()


def test_mappings_that_say_more_than_tokens() -> None:
    ids = torch.ones(1, 2, dtype=torch.long)
    assert is_tokens({"input_ids": ids})
    assert is_tokens({"input_ids": ids, "attention_mask": ids, "token_type_ids": torch.zeros_like(ids)})
    assert not is_tokens({"input_ids": ids, "token_type_ids": ids})
    assert not is_tokens({"input_ids": ids, "position_ids": ids})
    assert not is_tokens({"inputs_embeds": ids})


def test_hidden_states_there_and_back() -> None:
    h_BND = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    mask_BN = torch.tensor([[1, 1, 1], [1, 0, 0]], dtype=torch.bool)
    wide = padded(h_BND, mask_BN, 5)
    assert wide.shape == (2, 5, 4)
    assert torch.equal(wide[1, 0], h_BND[1, 0])
    assert wide[1, 1:].isnan().all() and wide[:, 3:].isnan().all()
    again, mask = unpadded(wide)
    assert torch.equal(mask, mask_BN)
    assert torch.equal(again, h_BND * mask_BN[..., None])
    short, mask = unpadded(wide[1:])
    assert short.shape == (1, 1, 4) and mask.tolist() == [[True]], "columns that are empty in all rows are cut"
    assert torch.equal(unpadded(wide.flip(1))[0][1:, :1], h_BND[1:, :1]), "wherever the NaNs stand"


def test_hidden_states_without_a_token_name_the_row() -> None:
    with pytest.raises(DataError, match="row 1 of the batch has no token"):
        unpadded(torch.stack([torch.zeros(2, 3), torch.full((2, 3), torch.nan)]))


# --- the tokenizer ------------------------------------------------------------------------------------------


def tokenizer(special: bool = True) -> Any:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "red", "green", "blue"]
    tool = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tool.pre_tokenizer = pre_tokenizers.Whitespace()
    names: dict[str, str] = {"eos_token": "[SEP]", "unk_token": "[UNK]"}
    if special:
        ends = [("[CLS]", 1), ("[SEP]", 2)]
        tool.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
        names |= {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tool, **names)


def rows(tokens: Tensor) -> list[list[int]]:
    return [row[row >= 0].tolist() for row in tokens]


def test_encode_pads_with_no_token_and_cuts() -> None:
    preprocessing = TextPreprocessing.of(tokenizer(), 4)
    tokens = preprocessing.encode(["red", "red green blue", ""])
    assert tokens.tolist() == [[1, 4, 2, X], [1, 4, 5, 2], [1, 2, X, X]], "cut before [SEP], not with it"
    assert preprocessing.encode(["red"], 9).shape == (1, 9)
    assert preprocessing.encode(["red green blue"], 3).tolist() == [[1, 4, 2]]
    assert preprocessing.encode([]).shape == (0, 0)


def test_a_text_of_nothing_has_a_token_all_the_same() -> None:
    assert TextPreprocessing.of(tokenizer(special=False), 4).encode(["", "red"]).tolist() == [[2], [4]]
    bare = tokenizer(special=False)
    bare.eos_token = bare.unk_token = None
    with pytest.raises(DataError, match="no token of the text ' '"):
        TextPreprocessing.of(bare, 4).encode(["red", " "])


def test_eval_transform_has_one_shape_and_travels_to_loader_workers() -> None:
    preprocessing = TextPreprocessing.of(tokenizer(), 6)
    transform = pickle.loads(pickle.dumps(preprocessing.eval_transform()))
    assert transform("green").tolist() == [1, 5, 2, X, X, X]
    assert preprocessing.eval_transform(3)("green red").tolist() == [1, 5, 2]


def test_wrong_texts_are_named() -> None:
    preprocessing = TextPreprocessing.of(tokenizer(), 6)
    with pytest.raises(DataError, match="text 1 is no str but int"):
        preprocessing.encode(["red", 3])  # type: ignore[list-item]
    with pytest.raises(DataError, match="a list of texts is expected"):
        preprocessing.encode("red")
    with pytest.raises(DataError, match=r"text 1 has no characters of UTF-8 at 4 \('\\ud83d'\)"):
        preprocessing.encode(["red", "red \ud83d"])
    with pytest.raises(DataError, match="a text of 3 tokens does not fit 2 columns"):
        from_rows([[1], [1, 2, 3]], 2)


def test_identity_is_the_tokenizers_content_not_its_state(tmp_path: Path) -> None:
    tool = tokenizer()
    before = TextPreprocessing.of(tool, 6)
    before.encode(["red green"])
    tool(["red", "red green"], padding=True, truncation=True, max_length=3)
    assert TextPreprocessing.of(tool, 6) == before
    tool.save_pretrained(tmp_path)
    assert tokenizer_hash(type(tool).from_pretrained(tmp_path)) == before.tokenizer
    assert tokenizer_hash(tokenizer(special=False)) != before.tokenizer
    shorter = TextPreprocessing.of(before.tool, 5)
    assert shorter != before
    assert shorter.encode(["red"]).tolist() == [[1, 4, 2]]


def test_what_was_read_from_a_file_cannot_encode() -> None:
    with pytest.raises(ConfigError, match="take the preprocessing of the loaded backbone"):
        TextPreprocessing(max_length=6, tokenizer="0" * 64).encode(["red"])
    with pytest.raises(ValueError, match="max_length must be at least 1"):
        TextPreprocessing(max_length=0, tokenizer="0" * 64)
