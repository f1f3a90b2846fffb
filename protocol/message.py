"""Messages: typed msgpack, checked on arrival, with tensors beside it as raw buffers.

A `Codec` is made once per message type. Encoding replaces every `Tensor` by [dtype, shape, index] and gives
its bytes, untouched, as the raw buffer of that index; decoding puts views of the received buffers back.
Everything that arrives is checked against the type by msgspec while it is decoded: a wrong type is a
`MessageError` that says where (`$.works[2].position`). Only values are ever built, never code: nothing from
the wire is unpickled, and msgspec allocates for an array only what its bytes pay for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import msgspec

from mycel.protocol.errors import LocalProtocolError, RemoteProtocolError
from mycel.protocol.mesh import Buffer
from mycel.protocol.tensor import Tensor

T = TypeVar("T")


class MessageError(RemoteProtocolError):
    """What came is not of the type it should be; the text says where and what was expected."""


class Codec(Generic[T]):
    """Encodes and decodes messages of one type. Safe to use from several threads, but for `encode_into`.

    Raises `LocalProtocolError` for a type that msgspec cannot check.
    """

    def __init__(self, message: type[T]) -> None:
        self._type = message
        try:
            found = _custom_types(msgspec.inspect.type_info(message))
        except (TypeError, NameError) as error:
            raise LocalProtocolError(f"{message!r} cannot be a message: {error}") from error
        strange = [cls for cls in found if cls not in (Tensor, memoryview, msgspec.Raw)]
        if strange:
            raise LocalProtocolError(f"{message!r} cannot be a message: no way to encode {strange[0]!r}")
        self.has_tensors = Tensor in found
        self._borrows = memoryview in found or msgspec.Raw in found
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[T] | None = None
        if not self.has_tensors:
            self._decoder = msgspec.msgpack.Decoder(message)

    def encode(self, value: T) -> tuple[bytes, list[Buffer]]:
        """(body, raw buffers). The buffers are the tensors' own, so leave those alone until they are sent.

        Raises `LocalProtocolError` for a value that cannot be encoded; it is not checked against the type.
        """
        raws: list[Buffer] = []

        def lay_aside(item: Any) -> Any:
            if type(item) is not Tensor:
                raise TypeError(f"cannot encode {type(item).__name__}")
            raws.append(memoryview(item.data).cast("B"))
            return item.dtype, item.shape, len(raws) - 1

        try:
            if not self.has_tensors:
                return self._encoder.encode(value), raws
            return msgspec.msgpack.encode(value, enc_hook=lay_aside), raws
        except _CANNOT_ENCODE as error:
            raise LocalProtocolError(f"{self._type!r}: {error}") from error

    def encode_into(self, value: T, buffer: bytearray, offset: int) -> None:
        """Encode a value without tensors into `buffer` from `offset` on; the buffer ends behind it.

        Raises as `encode`.
        """
        try:
            self._encoder.encode_into(value, buffer, offset)
        except _CANNOT_ENCODE as error:
            raise LocalProtocolError(f"{self._type!r}: {error}") from error

    def decode(self, body: Buffer, raws: Sequence[Buffer] = (), *, owned: bool = True) -> T:
        """The value, its tensors being views of `raws`, each used exactly once.

        With `owned` false the buffers are only lent, and what the value keeps of them is copied. Raises
        `MessageError`.
        """
        if not owned and self._borrows:
            body = bytes(body)
        try:
            if self._decoder is not None:
                if raws:
                    raise MessageError(f"{len(raws)} raw buffers came with a message that has no tensors")
                return self._decoder.decode(body)
            fetch = _Fetch(raws, owned)
            value = msgspec.msgpack.decode(body, type=self._type, dec_hook=fetch)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise MessageError(str(error)) from error
        if fetch.next != len(raws):
            raise MessageError(f"{len(raws)} raw buffers came, {fetch.next} tensors use them")
        return value


_CANNOT_ENCODE = (TypeError, ValueError, OverflowError, RecursionError, msgspec.EncodeError)


class _Fetch:
    """msgspec's hook for what it cannot decode itself: puts tensors back, in the order they were laid."""

    __slots__ = ("next", "owned", "raws")

    def __init__(self, raws: Sequence[Buffer], owned: bool) -> None:
        self.raws = raws
        self.owned = owned
        self.next = 0

    def __call__(self, wanted: type[Any], found: Any) -> Tensor:
        match found:
            case [str(dtype), [*sides], int(index)] if all(type(side) is int for side in sides):
                pass
            case _:
                raise ValueError("expected a tensor as [dtype, shape, index]")
        if index != self.next or index >= len(self.raws):
            raise ValueError(f"tensor of raw buffer {index} where {self.next} of {len(self.raws)} is next")
        self.next += 1
        raw = self.raws[index]
        try:
            return Tensor(dtype, tuple(sides), raw if self.owned else bytes(raw)).check()
        except RemoteProtocolError as error:
            raise ValueError(str(error)) from error


def _custom_types(info: msgspec.inspect.Type) -> list[Any]:
    """The types in `info`, at any depth, that msgspec leaves to hooks or whose values borrow its input."""
    found: list[Any] = []
    seen: dict[int, Any] = {}  # recursive types come as the same node again
    todo: list[Any] = [info]
    while todo:
        node = todo.pop()
        if id(node) in seen:
            continue
        seen[id(node)] = node
        if isinstance(node, msgspec.inspect.CustomType):
            found.append(node.cls)
        elif isinstance(node, msgspec.inspect.MemoryViewType):
            found.append(memoryview)
        elif isinstance(node, msgspec.inspect.RawType):
            found.append(msgspec.Raw)
        elif isinstance(node, msgspec.inspect.Type):
            todo.extend(getattr(node, name) for name in node.__struct_fields__)
        elif isinstance(node, msgspec.inspect.Field):
            todo.append(node.type)
        elif isinstance(node, tuple | list):
            todo.extend(node)
    return found
