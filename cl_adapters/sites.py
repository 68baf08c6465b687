"""Sites: the places in a backbone where an adapter reads its input and adds its output.

One table row per family of backbones, matched by structure and never by model name. A site has an
input tap and an output tap because papers differ in both: MOS and SEMA read the residual stream
before ``norm2`` and add to the branch of the feed-forward network,

    h = x + Attn(norm1 x);   out = h + FFN(norm2 h) + delta(h)

while a sequential adapter reads that branch's own output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from cl_adapters.errors import IncompatibleBackbone


@dataclass(frozen=True)
class Tap:
    """One end of a site: the first input ("in") or the output ("out") of a submodule.

    Attributes:
        module: dotted path below the encoder, as in ``encoder.get_submodule``.
        end: which end of that submodule.
    """

    module: str
    end: Literal["in", "out"]


@dataclass(frozen=True)
class Site:
    """A place where an adapter attaches.

    Attributes:
        name: stable key in saved files, such as "blocks.3.ffn".
        block: index of the transformer block, 0-based from the input.
        kind: "ffn_parallel" or "ffn_sequential".
        width: D, the width of the token vectors there.
        source: where the adapter's input x_BND is read.
        target: the output to which delta_BND is added; always an "out" tap.
    """

    name: str
    block: int
    kind: str
    width: int
    source: Tap
    target: Tap


@dataclass(frozen=True)
class Family:
    """One row of the site table.

    Attributes:
        name: of the family, for messages.
        blocks: dotted path of the list of blocks.
        parts: submodules that every block must have for the family to match.
        taps: per kind of site the (source, target) taps, with paths below the block.
        width: token width from (encoder, block).
        refuses: class names of blocks that have these parts in another arrangement.
    """

    name: str
    blocks: str
    parts: tuple[str, ...]
    taps: Mapping[str, tuple[Tap, Tap]]
    width: Callable[[nn.Module, nn.Module], int]
    refuses: tuple[str, ...] = ()

    def matches(self, encoder: nn.Module) -> bool:
        """Whether every block of ``encoder`` has this family's structure."""
        blocks = _blocks(encoder, self.blocks)
        return bool(blocks) and all(
            type(block).__name__ not in self.refuses and all(_has(block, part) for part in self.parts)
            for block in blocks
        )

    def sites(self, encoder: nn.Module, kind: str) -> tuple[Site, ...]:
        """The sites of that kind, one per block."""
        source, target = self.taps[kind]
        return tuple(
            Site(
                name=f"{self.blocks}.{i}.ffn",
                block=i,
                kind=kind,
                width=self.width(encoder, block),
                source=Tap(f"{self.blocks}.{i}.{source.module}", source.end),
                target=Tap(f"{self.blocks}.{i}.{target.module}", target.end),
            )
            for i, block in enumerate(_blocks(encoder, self.blocks))
        )


def _vit_width(encoder: nn.Module, block: nn.Module) -> int:
    return int(block.get_parameter("norm2.weight").numel())


def _post_norm_width(encoder: nn.Module, block: nn.Module) -> int:
    return int(block.get_submodule("output.dense").out_features)  # type: ignore[arg-type]


_BRANCH_END = Tap("drop_path2", "out")

FAMILIES: tuple[Family, ...] = (
    # timm: ViT, DeiT, DINOv2, CLIP / SigLIP image towers, BEiT, EVA: x + drop_path2(ls2(mlp(norm2 x)))
    Family(
        name="timm ViT, pre-norm",
        blocks="blocks",
        parts=("norm1", "attn", "norm2", "mlp", "drop_path2"),
        taps={"ffn_parallel": (Tap("norm2", "in"), _BRANCH_END), "ffn_sequential": (_BRANCH_END, _BRANCH_END)},
        width=_vit_width,
        refuses=("ResPostBlock", "ResPostRelPosBlock", "EvaBlockPostNorm"),
    ),
    # timm, residual post-norm: x + drop_path2(norm2(mlp x))
    Family(
        name="timm ViT, residual post-norm",
        blocks="blocks",
        parts=("norm1", "attn", "norm2", "mlp", "drop_path2"),
        taps={"ffn_parallel": (Tap("mlp", "in"), _BRANCH_END), "ffn_sequential": (_BRANCH_END, _BRANCH_END)},
        width=_vit_width,
    ),
    # transformers: BERT, RoBERTa and relatives: LayerNorm(dropout(dense(intermediate h)) + h)
    Family(
        name="transformers encoder, post-norm",
        blocks="encoder.layer",
        parts=("attention", "intermediate", "output.dense", "output.dropout", "output.LayerNorm"),
        taps={
            "ffn_parallel": (Tap("intermediate", "in"), Tap("output.dropout", "out")),
            "ffn_sequential": (Tap("output.dropout", "out"), Tap("output.dropout", "out")),
        },
        width=_post_norm_width,
    ),
)


def find_sites(encoder: nn.Module, kind: str) -> tuple[Site, ...]:
    """All sites of ``kind`` in ``encoder``, from the first block to the last.

    Raises:
        IncompatibleBackbone: no family of the table matches, or the family has no such sites.
    """
    for family in FAMILIES:
        if family.matches(encoder):
            if kind not in family.taps:
                raise IncompatibleBackbone(
                    f"{type(encoder).__name__} ({family.name}) has no sites of kind {kind!r}; "
                    f"it has: {', '.join(family.taps)}"
                )
            return family.sites(encoder, kind)
    known = "; ".join(family.name for family in FAMILIES)
    raise IncompatibleBackbone(
        f"no known adapter sites in {type(encoder).__name__}. Known structures: {known}. For another structure pass "
        "the sites yourself: FrozenBackbone.wrap(module, sites=[Site(...)], ...)"
    )


def _blocks(encoder: nn.Module, path: str) -> list[nn.Module]:
    return list(encoder.get_submodule(path).children()) if _has(encoder, path) else []


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True
