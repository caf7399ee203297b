"""Block manager: sharing, eviction, and books that check() can tell right from wrong."""

from collections.abc import Callable

import pytest
from nybble.engine.block_manager import BlockManager, KVGroup, Link
from nybble.engine.records import EngineRequest, SamplingParams
from nybble.engine.sequence import Sequence

from .fakes import kv_spec

BLOCK = 4


class Books:
    """A manager and its living sequences, checked after every change."""

    def __init__(self, num_blocks: int = 8, groups: int = 1, caching: bool = True) -> None:
        self.manager = BlockManager(map(kv_spec, range(groups)), num_blocks, BLOCK, caching)
        self.sequences: list[Sequence] = []

    def start(self, tokens: list[int], salt: str = "", reserve: int = 0, **params: int) -> Sequence | None:
        wanted = SamplingParams(max_tokens=20, **params)  # type: ignore[arg-type]
        request = EngineRequest(len(self.sequences), tokens, wanted, salt)
        seq = Sequence(request.request_id, request, 1000, (), 0.0)
        admitted = self.manager.admit(seq, reserve)
        assert admitted or not seq.block_tables
        self.sequences.append(seq)
        self.check()
        return seq if admitted else None

    def run(self, tokens: list[int], salt: str = "") -> Sequence:
        """A sequence whose prompt is computed."""
        seq = self.start(tokens, salt)
        assert seq is not None
        seq.num_computed_tokens = len(tokens)
        self.manager.commit(seq, len(tokens))
        self.check()
        return seq

    def end(self, seq: Sequence) -> None:
        self.manager.free(seq.detach_tables())
        self.check()

    def check(self) -> None:
        self.manager.check(self.sequences, [])


def hit(seq: Sequence | None) -> int:
    assert seq is not None
    return seq.num_computed_tokens


TEN = list(range(10))


def test_prefix_is_shared_while_running_and_after() -> None:
    books = Books()
    first = books.run(TEN)
    second = books.start([*TEN[:9], 99, 98])
    assert second is not None
    assert hit(second) == 8
    assert second.block_tables[0][:2] == first.block_tables[0][:2]
    assert second.block_tables[0][2] != first.block_tables[0][2]
    books.end(first)
    books.end(second)
    assert books.manager.num_free == 8
    assert hit(books.start(TEN)) == 8


def test_a_hit_leaves_a_token_to_compute() -> None:
    books = Books()
    books.run(TEN[:8])
    assert hit(books.start(TEN[:8])) == 4
    assert hit(books.start(TEN[:9])) == 8


def test_who_does_not_share() -> None:
    books = Books(num_blocks=32)
    books.run(TEN)
    assert hit(books.start(TEN, salt="other")) == 0
    assert hit(books.start(TEN, prompt_logprobs=0)) == 0
    assert hit(books.start([99, *TEN[1:]])) == 0
    assert hit(books.start([*TEN[:4], 99, *TEN[5:]])) == 4
    # The same block content after another beginning is another content.
    books.run([*range(50, 54), *TEN[4:8], 1])
    assert hit(books.start([*range(50, 54), *TEN[4:10]])) == 8
    assert hit(books.start([*range(60, 64), *TEN[4:10]])) == 0
    assert (books.manager.prefix_cache_queries, books.manager.prefix_cache_hits) == (69, 12)


def test_equal_hash_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    books = Books()
    monkeypatch.setattr(books.manager, "_digest", lambda data, person: b"same")
    books.run(TEN[:5])
    assert hit(books.start(TEN[:5])) == 4
    assert hit(books.start([90, 91, 92, 93, 94])) == 0


def test_hashes_are_keyed_per_process() -> None:
    keys = [Books().run(TEN).block_keys for _ in range(2)]
    assert not set(keys[0]) & set(keys[1])


def test_caching_off() -> None:
    books = Books(caching=False)
    first = books.run(TEN)
    assert hit(books.start(TEN)) == 0
    books.end(first)
    assert hit(books.start(TEN)) == 0
    assert books.manager.prefix_cache_queries == 0


@pytest.mark.parametrize(("first", "last"), [(100, 200), (200, 100)])
def test_least_recently_used_goes_first_and_ends_before_beginnings(first: int, last: int) -> None:
    books = Books(num_blocks=6)
    running = {base: books.run(list(range(base, base + 12))) for base in (100, 200)}
    books.end(running[first])
    books.end(running[last])
    taker = books.start([1] * 16)  # four blocks: all that first had, and the end of last
    assert taker is not None
    books.end(taker)
    assert hit(books.start([*range(last, last + 12), 1])) == 8


def test_a_hit_is_used_again() -> None:
    books = Books(num_blocks=4)
    for base in (100, 200):
        books.end(books.run(list(range(base, base + 8))))
    again = books.start(list(range(100, 105)))  # the older one is now the younger
    assert hit(again) == 4
    assert again is not None
    books.end(again)
    taker = books.start([1] * 9)
    assert taker is not None
    books.end(taker)
    assert hit(books.start(list(range(100, 105)))) == 4


def test_admission_is_all_or_nothing() -> None:
    books = Books(num_blocks=4)
    first = books.run(TEN)
    assert books.start([1] * 5) is None
    assert books.start([1] * 4, reserve=1) is None
    assert books.manager.num_free == 1
    # Cached blocks that it hits are not free for it as well.
    books.end(first)
    assert books.start([*TEN[:8], *[1] * 8], reserve=1) is None
    assert hit(books.start([*TEN[:8], *[1] * 8])) == 8


def test_waiting_in_vain_costs_one_look_and_notices_a_new_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    books = Books(num_blocks=16)
    prompt = list(range(40))
    running = books.start(prompt)
    assert running is not None
    waiting = Sequence(1, EngineRequest(1, [*prompt, 1], SamplingParams(20)), 1000, (), 0.0)
    looks: list[int] = []
    look = books.manager._link
    monkeypatch.setattr(books.manager, "_link", lambda seq, index: looks.append(index) or look(seq, index))
    for computed in range(0, 41, 4):
        running.num_computed_tokens = computed
        books.manager.commit(running, computed)
        looks.clear()
        admitted = books.manager.admit(waiting, reserve=1)
        assert admitted == (computed >= 24)  # 11 blocks, of which 5 are free: 6 must be found
        if admitted:
            break
        looks.clear()
        assert not books.manager.admit(waiting, reserve=1)
        assert len(looks) == 1
    assert hit(waiting) == 24


def test_groups_share_only_what_all_of_them_hold() -> None:
    books = Books(groups=2)
    first = books.run(TEN)
    assert len(first.block_tables) == 2
    books.manager.groups[1].forget(first.block_tables[1][1:])
    second = books.start(TEN)
    assert hit(second) == 4
    assert second is not None
    assert [len(table) for table in second.block_tables] == [3, 3]


def test_forget_makes_unfindable() -> None:
    books = Books()
    first = books.run(TEN)
    second = books.start(TEN)
    assert second is not None
    books.manager.forget(first)
    books.check()
    assert hit(books.start(TEN)) == 0
    books.end(first)
    books.end(second)
    assert books.manager.num_free == 5


def test_same_content_computed_twice_is_found_once() -> None:
    books = Books()
    twins = [books.start(TEN) for _ in range(2)]
    for seq in twins:
        assert seq is not None
        seq.num_computed_tokens = 10
        books.manager.commit(seq, 10)
        books.check()
    for seq in twins:
        assert seq is not None
        books.end(seq)
    assert hit(books.start(TEN)) == 8


def test_truncate() -> None:
    group = KVGroup(kv_spec(), 4)
    table: list[int] = []
    group.allocate(table, 3)
    group.truncate(table, 1)
    group.check([table])
    assert (len(table), group.num_free) == (1, 3)
    group.free(table)
    group.check([])
    assert group.num_free == 4


@pytest.mark.parametrize(
    "harm",
    [
        lambda group, table: table.pop(),
        lambda group, table: table.append(table[0]),
        lambda group, table: table.append(group._free[0]),
        lambda group, table: group._free.append(table[0]),
        lambda group, table: group._free.append(group._free[0]),
        lambda group, table: group._free.pop(),
        lambda group, table: group._cached.update({table[0]: None}),
        lambda group, table: group._by_key.clear(),
        lambda group, table: group._references.__setitem__(table[0], 2),
    ],
)
def test_check_finds_harm(harm: Callable[[KVGroup, list[int]], object]) -> None:
    group = KVGroup(kv_spec(), 6)
    table: list[int] = []
    group.allocate(table, 2)
    group.commit(table[0], Link(b"key", b"parent", (1, 2, 3, 4)))
    group.check([table])
    harm(group, table)
    with pytest.raises((AssertionError, KeyError)):
        group.check([table])
