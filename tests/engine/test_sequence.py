"""Sequence: what counts of what was sampled, and how far it must be computed."""

from nybble.engine.plan import PENDING
from nybble.engine.records import EngineRequest, SamplingParams
from nybble.engine.sequence import Sequence


def sequence(prompt: int = 4, max_model_len: int = 100, **params: object) -> Sequence:
    wanted = SamplingParams(**{"max_tokens": 10, **params})  # type: ignore[arg-type]
    return Sequence(0, EngineRequest(0, list(range(10, 10 + prompt)), wanted), max_model_len, (1, 2), 0.0)


def pending(seq: Sequence) -> int:
    """Plan a step that samples; the position of its token."""
    seq.num_computed_tokens = seq.num_tokens
    seq.token_ids.append(PENDING)
    return seq.num_tokens - 1


def test_stop_ids() -> None:
    assert sequence().stop_ids == {1, 2}
    assert sequence(stop_token_ids=(5,)).stop_ids == {1, 2, 5}
    assert sequence(stop_token_ids=(5,), ignore_eos=True).stop_ids == {5}


def test_accept_in_turn() -> None:
    seq = sequence(max_tokens=3)
    assert seq.accept(pending(seq), (7,)) == ([7], None, None)
    assert seq.accept(pending(seq), (8,)) == ([8], None, None)
    assert seq.token_ids == [10, 11, 12, 13, 7, 8]
    assert seq.accept(pending(seq), (9,)) == ([9], "length", None)


def test_stop_wins_over_length_and_is_not_counted() -> None:
    seq = sequence(max_tokens=1)
    assert seq.accept(pending(seq), (2,)) == ([], "stop", 2)


def test_max_model_len_is_a_length() -> None:
    seq = sequence(prompt=4, max_model_len=6)
    assert seq.compute_limit == 5
    assert seq.accept(pending(seq), (7,)) == ([7], None, None)
    assert seq.accept(pending(seq), (8,)) == ([8], "length", None)


def test_the_last_token_is_never_computed() -> None:
    seq = sequence(prompt=4, max_tokens=1)
    pending(seq)
    assert seq.num_tokens == 5
    assert seq.num_target_tokens == 4
    assert sequence(prompt=4, max_tokens=0).num_target_tokens == 3


def test_more_tokens_than_one_are_cut_at_the_end() -> None:
    seq = sequence(max_tokens=3)
    assert seq.accept(pending(seq), (7, 8, 9, 6)) == ([7, 8, 9], "length", None)
    seq = sequence()
    assert seq.accept(pending(seq), (7, 1, 9)) == ([7], "stop", 1)


def test_a_wrong_guess_steps_back() -> None:
    seq = sequence()
    position = pending(seq)
    seq.num_computed_tokens = position + 1  # the step after it is in flight, for one token...
    seq.token_ids.append(PENDING)
    seq.in_flight = 1
    assert seq.accept(position, (7, 8, 9)) == ([7, 8, 9], None, None)  # ... but there are three
    assert seq.token_ids[4:] == [7, 8, 9]
    assert (seq.num_computed_tokens, seq.num_discards) == (4, 1)


def test_no_token_at_all_computes_the_last_one_again() -> None:
    seq = sequence()
    assert seq.accept(pending(seq), ()) == ([], None, None)
    assert (seq.num_tokens, seq.num_computed_tokens, seq.num_discards) == (4, 3, 0)


def test_tables_are_copied_only_when_they_changed() -> None:
    seq = sequence()
    seq.block_tables = [[5, 6], [7, 8]]
    first = seq.freeze_tables(1)
    assert first == ((5,), (7,))
    assert seq.freeze_tables(1) is first
    assert seq.freeze_tables(2) == ((5, 6), (7, 8))
    assert seq.detach_tables() == [[5, 6], [7, 8]]
    seq.block_tables = [[1, 2], [3, 4]]
    assert seq.freeze_tables(2) == ((1, 2), (3, 4))
