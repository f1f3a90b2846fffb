"""What kernel.c offers: blocks of quantized items, as `mycel.compute.collective.quantize` describes them."""

from mycel.compute.collective.quantize import Bytes, Floats

def encode_blocks(
    items: Floats,
    wire: Bytes,
    bits: int,
    block: int,
    divisor: int,
    dither: Floats | None,
    decoded: Floats | None,
) -> bool:
    """Fill `wire` from `items / divisor`, `decoded` with what comes of it; False where one is not finite."""

def decode_blocks(wire: Bytes, out: Floats, bits: int, block: int, add: Floats | None) -> None:
    """Fill `out` with what `wire` means, plus `add`."""
