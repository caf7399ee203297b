"""Every message survives the wire; what is none is refused."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nybble.engine.messages import (
    FRAME_HEADER,
    MAX_FRAME_BYTES,
    Abort,
    Add,
    Failed,
    Progress,
    Ready,
    StepDone,
    Stop,
    body_length,
    decode_from_engine,
    decode_to_engine,
    encode,
)
from nybble.engine.records import (
    EngineRequest,
    EngineStats,
    ModelInfo,
    SamplingParams,
    SequenceOutput,
    TokenLogprobs,
)

ids = st.integers(0, 2**31)
floats = st.floats(allow_nan=False)
words = st.text(max_size=3)
params = st.builds(
    SamplingParams,
    max_tokens=ids,
    temperature=floats,
    logit_bias=st.dictionaries(ids, floats, max_size=3),
    stop_token_ids=st.lists(ids, max_size=3).map(tuple),
    seed=st.none() | st.integers(-(2**63), 2**64 - 1),
    logprobs=st.none() | ids,
)
logprobs = st.builds(TokenLogprobs, ids, floats, st.lists(ids, max_size=2), st.lists(floats, max_size=2))
outputs = st.builds(
    SequenceOutput,
    ids,
    st.lists(ids, max_size=3),
    logprobs=st.none() | st.lists(logprobs, max_size=2),
    prompt_logprobs=st.none() | st.lists(st.none() | logprobs, max_size=2),
    finish_reason=st.sampled_from([None, "stop", "length", "abort", "error"]),
    stop_token_id=st.none() | ids,
    error=st.none() | st.text(),
    queued_seconds=floats,
)
stats = st.builds(EngineStats, *[ids] * 4, floats, *[ids] * 5, floats, ids)
requests = st.builds(EngineRequest, ids, st.lists(ids, max_size=4), params, st.text(max_size=5))
info = st.builds(
    ModelInfo,
    *[words] * 4, ids, ids, words, ids, ids, st.lists(ids, max_size=2), *[ids] * 5, floats,
    st.dictionaries(words, floats, max_size=2),
)  # fmt: skip


@given(
    st.one_of(
        st.builds(Add, st.lists(requests, max_size=3)), st.builds(Abort, st.lists(ids)), st.just(Stop())
    )
)
def test_to_the_engine(message):
    frame = encode(message)
    assert body_length(frame[: FRAME_HEADER.size]) == len(frame) - FRAME_HEADER.size
    assert decode_to_engine(frame[FRAME_HEADER.size :]) == message


@given(
    st.one_of(
        st.builds(StepDone, st.lists(outputs, max_size=3), stats),
        st.builds(Progress, st.text(), ids, ids, st.text()),
        st.builds(Ready, info),
        st.builds(Failed, st.text(), st.booleans()),
    )
)
def test_from_the_engine(message):
    assert decode_from_engine(encode(message)[FRAME_HEADER.size :]) == message


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x92",
        encode(Failed("x", True))[4:],
        msgspec.msgpack.encode(["add", [{"request_id": "x"}]]),
    ],
)
def test_what_is_no_message_for_the_engine(body):
    with pytest.raises(msgspec.DecodeError):
        decode_to_engine(body)


def test_frames_have_a_limit():
    assert body_length(FRAME_HEADER.pack(MAX_FRAME_BYTES)) == MAX_FRAME_BYTES
    with pytest.raises(msgspec.DecodeError, match="at most"):
        body_length(FRAME_HEADER.pack(MAX_FRAME_BYTES + 1))
