"""CODECS, one file each: adapters stored in fewer bits, and read back as float32."""

from cl_adapters.codecs.base import Codec, codec_from, codecs, compressed_bytes, decode, is_encoded

__all__ = ["Codec", "codec_from", "codecs", "compressed_bytes", "decode", "is_encoded"]
