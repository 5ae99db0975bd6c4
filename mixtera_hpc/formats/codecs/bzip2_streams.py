"""Decode bzip2 streams."""

import bz2

from mixtera_hpc.formats.codecs.frames import Codec

__all__ = ["BZIP2"]

BZIP2 = Codec(start=bz2.BZ2Decompressor, errors=(OSError, EOFError))
