"""What the rows of the table of backbones are made of: places at the branches of a block and at its linear layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from cl_adapters.sites.attention import looks_up
from cl_adapters.sites.sites import Layout, Place, Sizes, Tap, has

Measure = Callable[[nn.Module], Sizes]
"""The sizes at one place of a block."""


def width_of(path: str, attribute: str = "") -> Measure:
    """D from the length of a parameter, or from an attribute of a submodule."""

    def sizes(block: nn.Module) -> Sizes:
        if attribute:
            width = int(getattr(block.get_submodule(path), attribute))
        else:
            width = int(block.get_parameter(path).numel())
        return Sizes(width, width)

    return sizes


def any_block(block: nn.Module) -> bool:
    """True: the place is in every block of the family."""
    return True


def branches(
    sizes: Measure,
    *,
    attn: tuple[Tap, Tap],
    ffn: tuple[Tap, Tap],
    block: Tap,
    inner: bool = True,
    whole: Callable[[nn.Module], bool] = any_block,
    ffn_layout: Layout | None = None,
    ffn_rows: Tap | None = None,
) -> dict[str, Place]:
    """Sites on the two branches of a block; each pair is (input, end) of the branch.

    Args:
        sizes: measures a block.
        attn: ends of the attention.
        ffn: ends of the feed-forward network.
        block: input of the block.
        inner: the input belongs to the branch alone, so that an adapter may change it.
        whole: the condition of the sites around the attention.
        ffn_layout: layout at the feed-forward network, where it is not the family's.
        ffn_rows: as ``Site.rows``, of the feed-forward network.

    Returns:
        The kinds attn_* and ffn_* (parallel, sequential, before) and block_parallel.
    """
    places = {}
    labelled = ("attn", attn, whole, None, None), ("ffn", ffn, any_block, ffn_layout, ffn_rows)
    for label, (start, end), fits, layout, rows in labelled:
        places[f"{label}_parallel"] = Place(start, end, label, sizes, fits, layout=layout, rows=rows)
        places[f"{label}_sequential"] = Place(end, end, label, sizes, fits, layout=layout, rows=rows)
        if inner:
            places[f"{label}_before"] = Place(start, start, label, sizes, fits, layout=layout, rows=rows)
    return places | {"block_parallel": Place(block, ffn[1], "block", sizes, whole)}


def linear(
    *, fits: Callable[[nn.Module], bool] = any_block, rows: Tap | None = None, windows: bool = False, **paths: str
) -> dict[str, Place]:
    """One site on each linear layer: kind to path.

    Args:
        fits: a condition on the block, besides that the layer is there and is one.
        rows: as ``Site.rows``.
        windows: as ``Site.windows``.
        **paths: path of the layer per kind, such as ``output="attn.proj"``.
    """

    def sizes_of(path: str) -> Measure:
        def sizes(block: nn.Module) -> Sizes:
            return Sizes(*linear_widths(block.get_submodule(path)))

        return sizes

    def there(path: str) -> Callable[[nn.Module], bool]:
        return lambda block: has(block, path) and is_linear(block.get_submodule(path)) and fits(block)

    return {
        kind: Place(
            Tap(path, "in"),
            Tap(path, "out"),
            kind,
            sizes_of(path),
            there(path),
            windows=windows,
            layout="tokens",
            rows=rows,
        )
        for kind, path in paths.items()
    }


def norm(
    branch: str,
    path: str,
    sizes: Measure | None = None,
    *,
    fits: Callable[[nn.Module], bool] = any_block,
    layout: Layout | None = None,
    rows: Tap | None = None,
) -> dict[str, Place]:
    """The site on what a branch's norm puts out.

    Args:
        branch: "attn" or "ffn".
        path: of the norm.
        sizes: measures a block; default the norm's weight.
        fits: as in :class:`Place`.
        layout: as in :class:`Place`.
        rows: as ``Site.rows``.

    Returns:
        The kind attn_norm or ffn_norm.
    """
    kind, end = f"{branch}_norm", Tap(path, "out")
    sizes = sizes or width_of(f"{path}.weight")
    return {kind: Place(end, end, kind, sizes, fits, layout=layout, rows=rows)}


def fused_qkv(path: str, output: str) -> dict[str, Place]:
    """Sites query, key and value on one fused projection, whose output is [q | k | v] of equal widths.

    Args:
        path: the fused projection.
        output: the projection of the heads' output; its input is as wide as a third has to be (it is not where
            several queries share a key).
    """

    def equal(block: nn.Module) -> bool:
        layers = [block.get_submodule(at) for at in (path, output) if has(block, at)]
        if len(layers) < 2 or not all(map(is_linear, layers)):
            return False
        return linear_widths(layers[0])[1] == 3 * linear_widths(layers[1])[0]

    def sizes(block: nn.Module) -> Sizes:
        width, out_width = linear_widths(block.get_submodule(path))
        return Sizes(width, out_width // 3)

    read, add = Tap(path, "in"), Tap(path, "out")
    return {
        kind: Place(read, add, kind, sizes, equal, qkv_part=part) for part, kind in enumerate(("query", "key", "value"))
    }


def input_width_of(path: str) -> Measure:
    """D, the input width of a linear layer."""

    def sizes(block: nn.Module) -> Sizes:
        width = linear_widths(block.get_submodule(path))[0]
        return Sizes(width, width)

    return sizes


def post_norm(
    attention: str,
    layers: dict[str, Place],
    *,
    attn_end: str = "attention.output.dropout",
    ffn: str = "intermediate",
    ffn_end: str = "output.dropout",
    norms: tuple[str, str] = ("attention.output.LayerNorm", "output.LayerNorm"),
) -> dict[str, Place]:
    """norm(h + branch(h)): the inputs of the branches are the residual stream, so nothing may be added to them.

    Args:
        attention: module whose input is that of the attention.
        layers: sites on linear layers, "up" among them.
        attn_end: module whose output the attention adds to the stream.
        ffn: module whose input is that of the feed-forward network.
        ffn_end: module whose output it adds to the stream.
        norms: of the attention and of the feed-forward network.
    """
    places = branches(
        input_width_of(layers["up"].source.module),
        attn=(Tap(attention, "in"), Tap(attn_end, "out")),
        ffn=(Tap(ffn, "in"), Tap(ffn_end, "out")),
        block=Tap(attention, "in"),
        inner=False,
    )
    return places | norm("attn", norms[0]) | norm("ffn", norms[1]) | layers


def pre_norm(
    attn: tuple[str, str], ffn: tuple[str, str], width: Measure, layers: dict[str, Place], rows: Tap | None = None
) -> dict[str, Place]:
    """h + branch(norm(h)).

    Args:
        attn: norm of the attention, and module whose output is added to the stream.
        ffn: the same of the feed-forward network.
        width: measures D.
        layers: sites on linear layers.
        rows: as ``Site.rows``, of the feed-forward network.
    """
    places = branches(
        width,
        attn=(Tap(attn[0], "out"), Tap(attn[1], "out")),
        ffn=(Tap(ffn[0], "in"), Tap(ffn[1], "out")),
        block=Tap(attn[0], "in"),
        ffn_rows=rows,
    )
    return places | norm("attn", attn[0], width) | norm("ffn", ffn[0], width, rows=rows) | layers


def projections(attention: str, output: str = "o_proj") -> dict[str, Place]:
    """Query, key, value and output below an attention, as most call them, and its inside."""
    query, key, value, out = (f"{attention}.{name}" for name in ("q_proj", "k_proj", "v_proj", output))
    return linear(query=query, key=key, value=value, output=out) | inside(attention, out)


def unscaled(*children: str) -> Callable[[nn.Module], bool]:
    """Blocks that have weights in these children only, and no number that scales a branch before it is added.

    Such a number (Granite, MiniCPM), another norm (GLM-4) or another branch would change what is added at a site.
    """

    def fits(block: nn.Module) -> bool:
        known = {name for name, _ in block.named_parameters()}
        scales = [name for name in vars(block) if any(word in name for word in ("residual", "factor", "scale"))]
        return {name.partition(".")[0] for name in known} <= set(children) and not scales

    return fits


def inside(attention: str, output: str) -> dict[str, Place]:
    """The site inside an attention of transformers, at its path; ``output``: path of the projection of its heads."""

    def width_of_head(block: nn.Module) -> int:
        module: Any = block.get_submodule(attention)
        own: Any = [getattr(module, name, None) for name in ("head_dim", "attention_head_size")]
        return int(own[0] or own[1] or 0)

    def fits(block: nn.Module) -> bool:
        there = has(block, attention) and has(block, output)
        return there and looks_up(block.get_submodule(attention)) and width_of_head(block) > 0

    def sizes(block: nn.Module) -> Sizes:
        out_width = linear_widths(block.get_submodule(output))[0]
        heads = out_width // width_of_head(block)
        return Sizes(out_width + heads, out_width, heads)

    here = Tap(attention, "inside")
    return {"attention": Place(here, here, "attention", sizes, fits)}


def is_linear(layer: nn.Module) -> bool:
    """Whether a module computes W x + b: nn.Linear (quantised ones too), or GPT-2's Conv1D, its transpose."""
    return isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"


def linear_widths(layer: nn.Module) -> tuple[int, int]:
    """Input and output width of a linear layer."""
    own: Any = layer
    if isinstance(layer, nn.Linear):  # a quantised weight does not have the layer's shape
        return int(own.in_features), int(own.out_features)
    return int(own.weight.shape[0]), int(own.weight.shape[1])


MLP_LAYERS = linear(up="mlp.fc1", down="mlp.fc2")
GATED_LAYERS = linear(up="mlp.up_proj", gate="mlp.gate_proj", down="mlp.down_proj")
