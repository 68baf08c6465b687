"""Where adapters attach: sites, and one table per family of backbones."""

from cl_adapters.sites.sites import Family, Layout, Place, Site, Sizes, Tap, has

__all__ = ["Family", "Layout", "Place", "Site", "Sizes", "Tap", "has"]
