"""Messages between the gateway and the engine: msgspec over a socket pair, length-framed.

A frame is a 4-byte little-endian length and a msgpack body. To the engine: ``ToEngine``; from it:
``FromEngine``. One ``StepDone`` per step, so a silent engine with work in hand is a hung one.
"""

import struct

import msgspec

from .records import EngineRequest, EngineStats, ModelInfo, SequenceOutput

FRAME_HEADER = struct.Struct("<I")
MAX_FRAME_BYTES = 1 << 30


class Add(msgspec.Struct, tag="add", array_like=True):
    """Start these requests."""

    requests: list[EngineRequest]


class Abort(msgspec.Struct, tag="abort", array_like=True):
    """Stop these requests; the engine answers nothing for them afterwards."""

    request_ids: list[int]


class Stop(msgspec.Struct, tag="stop", array_like=True):
    """Leave now."""


class Progress(msgspec.Struct, tag="progress", array_like=True):
    """Loading goes on: ``done`` of ``total`` modules of ``phase``. ``line`` is for the log, may be empty."""

    phase: str
    done: int
    total: int
    line: str = ""


class Ready(msgspec.Struct, tag="ready", array_like=True):
    """The model is loaded."""

    info: ModelInfo


class StepDone(msgspec.Struct, tag="step", array_like=True):
    """One step ended."""

    outputs: list[SequenceOutput]
    stats: EngineStats


class Failed(msgspec.Struct, tag="failed", array_like=True):
    """The engine cannot go on. ``user_error``: a ConfigError, so a restart would not help."""

    message: str
    user_error: bool


ToEngine = Add | Abort | Stop
FromEngine = Progress | Ready | StepDone | Failed

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def encode(message: ToEngine | FromEngine) -> bytes:
    """A whole frame: header and body."""
    body = _encoder.encode(message)
    return FRAME_HEADER.pack(len(body)) + body


def body_length(header: bytes) -> int:
    """Bytes of the body that follows ``header``. Raises msgspec.DecodeError above MAX_FRAME_BYTES."""
    length: int = FRAME_HEADER.unpack(header)[0]
    if length > MAX_FRAME_BYTES:
        raise msgspec.DecodeError(f"a frame of {length} bytes; at most {MAX_FRAME_BYTES} are allowed")
    return length


def decode_to_engine(body: bytes) -> ToEngine:
    """The body of a frame sent to the engine. Raises msgspec.DecodeError on anything else."""
    return _to_engine.decode(body)


def decode_from_engine(body: bytes) -> FromEngine:
    """The body of a frame sent by the engine. Raises msgspec.DecodeError on anything else."""
    return _from_engine.decode(body)
