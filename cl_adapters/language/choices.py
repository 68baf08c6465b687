"""Many answers to one prompt: what it takes to compute of the prompt is computed once.

B prompts, M answers, P tokens of a prompt, n of an answer, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_adapters.bank.routes import Routes
from cl_adapters.language.passes import Before, Passes
from cl_adapters.language.routes import taken
from cl_adapters.language.tokens import Ids, Pair, filled


def shared_scores(
    passes: Passes, pairs: Sequence[Pair], rows_M: Tensor, routes: Routes | None, batch: int
) -> Tensor | None:
    """log p of answers, from keys and values of their prompts.

    Args:
        passes: the model; neither routers nor adapters inside the attention may be in use.
        pairs: M prompts with answers.
        rows_M: int64 [M], which of the B prompts each has.
        routes: of the B prompts.
        batch: rows computed at a time.

    Returns:
        float32 [M] on the CPU; None where that cannot be: the model keeps no keys and values that can be chosen from by
        row, or long answers cut their prompt elsewhere than short ones.
    """
    prompts: dict[int, Ids] = {}
    if any(prompts.setdefault(row, prompt) != prompt for row, (prompt, _) in zip(rows_M.tolist(), pairs, strict=True)):
        return None
    order_B = torch.tensor(sorted(prompts, key=lambda row: len(prompts[row]), reverse=True))
    found_M = torch.zeros(len(pairs))
    with torch.no_grad():
        for rows in order_B.split(batch):
            tokens_BP = filled([prompts[row] for row in rows.tolist()], left=True).to(passes.device)
            output = passes.output(tokens_BP, taken(routes, rows), keep=1, use_cache=True)
            before = Before(tokens_BP, getattr(output, "past_key_values", None))
            if not hasattr(before.cache, "reorder_cache"):
                return None
            log_p_BV = output.logits[:, -1].float().log_softmax(1)
            place_of = {row: place for place, row in enumerate(rows.tolist())}
            own = [column for column, row in enumerate(rows_M.tolist()) if row in place_of]
            own.sort(key=lambda column: len(pairs[column][1]))
            for columns in torch.tensor(own).split(batch):
                answers_Mn = filled([pairs[column][1] for column in columns.tolist()], left=False).to(passes.device)
                places_M = torch.tensor([place_of[row] for row in rows_M[columns].tolist()], device=passes.device)
                first_M = log_p_BV[places_M, answers_Mn[:, 0]]
                rest_M = _rest(passes, before, places_M, answers_Mn, taken(routes, rows_M[columns]))
                found_M[columns] = (first_M + rest_M).cpu()
    return found_M


def _rest(
    passes: Passes, before: Before, places_M: Tensor, answers_Mn: Tensor, routes: Routes | None
) -> Tensor | float:
    """log p of the tokens behind the first, float32 [M]."""
    keep = answers_Mn.shape[1] - 1
    if not keep:
        return 0.0
    cache = copy.deepcopy(before.cache)  # the pass adds to it
    cache.reorder_cache(places_M)
    own = Before(before.tokens_BP[places_M], cache)
    logits_MnV = passes.output(answers_Mn[:, :-1], routes, keep=keep, before=own).logits[:, -keep:]
    loss_Mn = F.cross_entropy(
        logits_MnV.float().flatten(0, 1), answers_Mn[:, 1:].flatten(), ignore_index=-1, reduction="none"
    ).view(-1, keep)
    return -loss_Mn.sum(1)
