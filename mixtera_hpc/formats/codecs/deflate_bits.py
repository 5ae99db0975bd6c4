"""Begin decoding a deflate stream (RFC 1951) in the middle of a byte.

Deflate blocks begin at any bit, but decoders begin at a byte. Empty blocks in front of the first real one fill the bits
before it. Shifting the data instead would misplace stored blocks, whose content begins at a byte boundary.
"""

__all__ = ["align_to_bit"]

# A deflate block without content, as (bits, number of bits); the lowest bit comes first in the stream.
# RFC 1951, section 3.2.6, fixed codes: BFINAL=0, BTYPE=01, then the end-of-block code of seven zeros. An even size.
_EMPTY_FIXED_BLOCK = (2, 10)
# Section 3.2.7, dynamic codes: one bit each for literal 255, end-of-block, and one distance. An odd size.
_EMPTY_DYNAMIC_BLOCK = (0x46AFF90000000000081C004, 91)


def align_to_bit(data: bytes, bit: int) -> bytes:
    """Build a separate stream from a deflate block that begins at bit `bit` (0 to 7) of the first byte of `data`."""
    # 10 bits per fixed block reach every even offset; the dynamic block of 91 bits comes first for an odd one.
    filler, size = _EMPTY_DYNAMIC_BLOCK if bit % 2 else (0, 0)
    block, block_bits = _EMPTY_FIXED_BLOCK
    while size % 8 != bit:
        filler |= block << size
        size += block_bits

    # The first byte of data: its bits from `bit` on, moved behind the filler.
    head = filler | data[0] >> bit << size
    return head.to_bytes(size // 8 + 1, "little") + data[1:]
