"""Sites: the places in a backbone where an adapter reads its input and adds its output.

A site has an input tap and an output tap because papers differ in both: MOS and SEMA read the residual stream before
``norm2`` and add to the branch of the feed-forward network,

    h = x + Attn(norm1 x);   out = h + FFN(norm2 h) + delta(h)

LAE reads after ``norm1`` and adds to the attention branch, LoRA sits on the key and value projections, a prefix
inside the attention. Which sites a backbone has stands in :mod:`cl_adapters.sites.families`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from cl_adapters.errors import IncompatibleBackbone

Layout = Literal["tokens", "grid", "map"]
"""How activations lie: "tokens" [B, N, D], "grid" [B, H, W, D], "map" [B, D, H, W]."""


@dataclass(frozen=True)
class Tap:
    """One end of a site: the first input ("in") or the output ("out") of a submodule, or the "inside" of an attention.

    Attributes:
        module: dotted path below the encoder, as in ``encoder.get_submodule``.
        end: which end of that submodule. Inside an attention of transformers (:mod:`cl_adapters.sites.attention`) the
            queries and their mass are read, and what is added is added to the heads' output.
    """

    module: str
    end: Literal["in", "out", "inside"]

    def below(self, path: str) -> Tap:
        """The same end where the dotted path of the module starts at ``path``."""
        return Tap(f"{path}.{self.module}", self.end)


@dataclass(frozen=True)
class Site:
    """A place where an adapter attaches.

    Attributes:
        name: stable key in saved files, such as "blocks.3.ffn".
        block: index of the block, 0-based from the input.
        kind: such as "ffn_parallel" or "key".
        width: D, the width of the vectors at the source.
        source: where the adapter's input is read.
        target: where its output is added.
        out_width: O, the width of what is added; default D.
        heads: attention heads, at sites of kind "attention".
        qkv_part: at a fused projection the part of the target that is added to: 0 query, 1 key, 2 value.
        layout: how activations lie there.
        windows: whether the leading dimension holds several windows of each image, image by image.
        rows: where all tokens of a batch lie in one row, [B * N, D], at the source: a place before it where they lie as
            [B, N, D].
    """

    name: str
    block: int
    kind: str
    width: int
    source: Tap
    target: Tap
    out_width: int = 0
    heads: int = 0
    qkv_part: int | None = None
    layout: Layout = "tokens"
    windows: bool = False
    rows: Tap | None = None

    def __post_init__(self) -> None:
        if not self.out_width:
            object.__setattr__(self, "out_width", self.width)


@dataclass(frozen=True)
class Sizes:
    """Widths at one place of one block: D read, O added, and attention heads where they matter."""

    width: int
    out_width: int
    heads: int = 0


@dataclass(frozen=True)
class Place:
    """One kind of site in a family; paths are below the block.

    Attributes:
        source, target: as in :class:`Site`.
        label: last part of the site's name.
        sizes: measures one block.
        fits: whether this block has the place; families differ in details of their attention.
        qkv_part, windows, rows: as in :class:`Site`.
        layout: of the activations at the source; default the family's.
    """

    source: Tap
    target: Tap
    label: str
    sizes: Callable[[nn.Module], Sizes]
    fits: Callable[[nn.Module], bool] = lambda block: True
    qkv_part: int | None = None
    windows: bool = False
    layout: Layout | None = None
    rows: Tap | None = None


@dataclass(frozen=True)
class Family:
    """A structure of backbones, matched by its parts and never by a model's name.

    Attributes:
        name: of the family, for messages.
        blocks: dotted path of the list of blocks; "*" stands for every child ("layers.*.blocks").
        parts: submodules that every block must have for the family to match.
        places: per kind of site where it is.
        refuses: class names of blocks that have these parts in another arrangement.
        fits: another condition on every block, for arrangements that show in more than the parts.
        layout: of the activations between the blocks.
        resume: (encoder, input of block b, b) to the features; None where that is not known.
        resumes: whether ``resume`` fits this encoder; some of a family give their blocks more than the activations.
    """

    name: str
    blocks: str
    parts: tuple[str, ...]
    places: Mapping[str, Place]
    refuses: tuple[str, ...] = ()
    fits: Callable[[nn.Module], bool] = lambda block: True
    layout: Layout = "tokens"
    resume: Callable[[nn.Module, Tensor, int], Tensor] | None = None
    resumes: Callable[[nn.Module], bool] = lambda encoder: True

    def matches(self, encoder: nn.Module) -> bool:
        """Whether every block of ``encoder`` has this family's structure."""
        blocks = self.find_blocks(encoder)
        return bool(blocks) and all(
            type(block).__name__ not in self.refuses
            and all(has(block, part) for part in self.parts)
            and self.fits(block)
            for _, block in blocks
        )

    def sites(self, encoder: nn.Module, kind: str) -> tuple[Site, ...]:
        """The sites of that kind, one per block.

        Raises:
            IncompatibleBackbone: there are none.
        """
        blocks = self.find_blocks(encoder)
        kinds = [kind for kind, place in self.places.items() if all(place.fits(block) for _, block in blocks)]
        if kind not in kinds:
            raise IncompatibleBackbone(
                f"{type(encoder).__name__} ({self.name}) has no sites of kind {kind!r}; it has: {', '.join(kinds)}"
            )
        place = self.places[kind]
        return tuple(self._site(place, kind, i, *block) for i, block in enumerate(blocks))

    def resumable(self, encoder: nn.Module) -> bool:
        """Whether ``encoder`` can go on from the input of a block."""
        return self.resume is not None and self.resumes(encoder)

    def find_blocks(self, encoder: nn.Module) -> list[tuple[str, nn.Module]]:
        """Path and module of every block, from the input to the output."""
        found = [("", encoder)]
        for step in self.blocks.split(".*."):
            found = [
                (f"{path}{step}.{name}.", child)
                for path, module in found
                if has(module, step)
                for name, child in module.get_submodule(step).named_children()
            ]
        return [(path[:-1], module) for path, module in found]

    def _site(self, place: Place, kind: str, index: int, path: str, block: nn.Module) -> Site:
        sizes = place.sizes(block)
        return Site(
            name=f"{path}.{place.label}",
            block=index,
            kind=kind,
            width=sizes.width,
            source=place.source.below(path),
            target=place.target.below(path),
            out_width=sizes.out_width,
            heads=sizes.heads,
            qkv_part=place.qkv_part,
            layout=place.layout or self.layout,
            windows=place.windows,
            rows=None if place.rows is None else place.rows.below(path),
        )


def has(module: nn.Module, path: str) -> bool:
    """Whether ``module`` has a submodule of that path."""
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True
