"""The paged KV cache's books: which block holds what, for whom. Plain integers, no tensors.

A block of a group is exactly one of: free (holds nothing of use), cached (no sequence holds it, its
content can be found again) or used (in the tables of one or more sequences; may be findable too).
"""

import hashlib
import secrets
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from .records import KVSpec
from .sequence import Sequence


class Link(NamedTuple):
    """What identifies a full block's content: its tokens and, through ``parent``, all before them.

    The keys are keyed hashes that nobody outside the process can aim at; tokens are compared all the same.
    """

    key: bytes
    parent: bytes
    tokens: tuple[int, ...]


class KVGroup:
    """The blocks of one KV spec."""

    def __init__(self, spec: KVSpec, num_blocks: int) -> None:
        self.spec = spec
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._links: list[Link | None] = [None] * num_blocks
        self._by_key: dict[bytes, int] = {}
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_free(self) -> int:
        """Blocks that ``allocate`` can give: free and cached ones."""
        return len(self._free) + len(self._cached)

    def match_prefix(self, chain: Iterable[Link]) -> list[int]:
        """The blocks that hold the longest known beginning of ``chain``. Changes nothing."""
        blocks: list[int] = []
        for link in chain:
            block = self._by_key.get(link.key)
            if block is None or self._links[block] != link:
                break
            blocks.append(block)
        return blocks

    def num_free_without(self, blocks: list[int]) -> int:
        """``num_free`` once ``blocks`` are held."""
        return self.num_free - sum(self._references[block] == 0 for block in blocks)

    def hold(self, blocks: list[int]) -> list[int]:
        """A new table that begins with these matched blocks."""
        for block in blocks:
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1
        return list(blocks)

    def allocate(self, table: list[int], count: int) -> None:
        """Append ``count`` blocks to ``table``; what was cached longest ago gives way."""
        assert count <= self.num_free
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _unused = self._cached.popitem(last=False)
                self._forget(block)
            self._references[block] = 1
            table.append(block)

    def truncate(self, table: list[int], num_blocks: int) -> None:
        """Give back all but the first ``num_blocks`` blocks of ``table``."""
        # From the end: a prefix is worth more than what follows it, so the end must be evicted first.
        while len(table) > num_blocks:
            block = table.pop()
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._links[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def free(self, table: list[int]) -> None:
        """Give back every block of ``table``."""
        self.truncate(table, 0)

    def commit(self, block: int, link: Link) -> None:
        """Make a used block's content findable, unless another block with the same content is."""
        assert self._references[block] > 0
        if self._links[block] is None and link.key not in self._by_key:
            self._links[block] = link
            self._by_key[link.key] = block

    def forget(self, table: list[int]) -> None:
        """Make the blocks of ``table`` unfindable."""
        for block in table:
            self._forget(block)

    def _forget(self, block: int) -> None:
        link = self._links[block]
        if link is not None:
            del self._by_key[link.key]
            self._links[block] = None

    def check(self, tables: Iterable[list[int]]) -> None:
        """Assert that the books are right, ``tables`` being all tables there are."""
        held: Counter[int] = Counter()
        for table in tables:
            assert len(set(table)) == len(table), "a table holds a block twice"
            held.update(table)
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        for block in range(self.num_blocks):
            assert self._references[block] == held[block], "references do not match the tables"
            states = (block in free) + (block in self._cached) + (held[block] > 0)
            assert states == 1, "a block must be exactly one of free, cached, used"
            link = self._links[block]
            assert block not in free or link is None, "a free block can be found"
            assert block not in self._cached or link is not None, "a cached block cannot be found"
            assert link is None or self._by_key[link.key] == block
        assert len(self._by_key) == sum(link is not None for link in self._links)


class BlockManager:
    """All groups together: a sequence's tables cover the same tokens in each."""

    def __init__(
        self,
        specs: Iterable[KVSpec],
        num_blocks: int,
        block_size: int,
        enable_prefix_caching: bool = True,
    ) -> None:
        """``num_blocks`` of ``block_size`` tokens in each group."""
        self.groups = [KVGroup(spec, num_blocks) for spec in specs]
        assert self.groups
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.prefix_cache_queries = 0
        self.prefix_cache_hits = 0
        self._secret = secrets.token_bytes(32)

    @property
    def num_free(self) -> int:
        """Blocks that every group can give."""
        return min(group.num_free for group in self.groups)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens``."""
        return -(-num_tokens // self.block_size)

    def lacking(self, seq: Sequence, num_tokens: int) -> int:
        """Blocks that ``seq`` needs beside its own to hold its first ``num_tokens``."""
        return max(0, self.blocks_for(num_tokens) - len(seq.block_tables[0]))

    def admit(self, seq: Sequence, reserve: int) -> bool:
        """Give ``seq``, which holds nothing, blocks for all its known tokens, cached ones first.

        False, and nothing is changed, if fewer than ``reserve`` blocks would stay free. Sets
        ``num_computed_tokens``; at least one token is left to compute.
        """
        target = seq.num_target_tokens
        usable = (target - 1) // self.block_size if self.enable_prefix_caching and seq.reads_cache else 0
        total = self.blocks_for(target)
        # While it waits in vain its whole prompt is not looked up in every step: one block tells.
        if self.num_free < total - seq.num_matched_blocks + reserve and not self._matches_more(seq, usable):
            return False
        matches = [group.match_prefix(self._chain(seq, usable)) for group in self.groups]
        num_hits = min(map(len, matches))
        seq.num_matched_blocks = num_hits
        count = total - num_hits
        for group, match in zip(self.groups, matches, strict=True):
            del match[num_hits:]
            if group.num_free_without(match) < count + reserve:
                return False
        seq.block_tables = [group.hold(match) for group, match in zip(self.groups, matches, strict=True)]
        self.grow(seq, count)
        seq.num_committed_blocks = num_hits
        seq.num_computed_tokens = num_hits * self.block_size
        if seq.queued_seconds is None and self.enable_prefix_caching and seq.reads_cache:
            self.prefix_cache_queries += seq.num_prompt_tokens
            self.prefix_cache_hits += seq.num_computed_tokens
        return True

    def _matches_more(self, seq: Sequence, usable: int) -> bool:
        """Whether more blocks may match than last time: not if the first that did not still does not."""
        if seq.num_matched_blocks >= usable:
            return False
        link = self._link(seq, seq.num_matched_blocks)
        return all(group.match_prefix((link,)) for group in self.groups)

    def grow(self, seq: Sequence, count: int) -> None:
        """Append ``count`` blocks to the tables of ``seq``; they must be free."""
        for group, table in zip(self.groups, seq.block_tables, strict=True):
            group.allocate(table, count)

    def commit(self, seq: Sequence, num_tokens: int) -> None:
        """Make the full blocks among the first ``num_tokens`` findable: a step that has ended wrote them."""
        if not self.enable_prefix_caching:
            return
        for index in range(seq.num_committed_blocks, num_tokens // self.block_size):
            link = self._link(seq, index)
            for group, table in zip(self.groups, seq.block_tables, strict=True):
                group.commit(table[index], link)
            seq.num_committed_blocks = index + 1

    def forget(self, seq: Sequence) -> None:
        """Make what ``seq`` holds unfindable: its content is not to be trusted."""
        for group, table in zip(self.groups, seq.block_tables, strict=False):
            group.forget(table)

    def free(self, tables: list[list[int]]) -> None:
        """Give back the tables that a sequence detached; they are empty afterwards."""
        for group, table in zip(self.groups, tables, strict=False):
            group.free(table)

    def _chain(self, seq: Sequence, num_blocks: int) -> Iterator[Link]:
        return (self._link(seq, index) for index in range(num_blocks))

    def _link(self, seq: Sequence, index: int) -> Link:
        """Full block ``index`` of ``seq``; its key is computed once. ``block_keys[0]`` is the root."""
        keys = seq.block_keys
        tokens = tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])
        if not keys:
            keys.append(self._digest(seq.request.cache_salt.encode(), b"root"))
        if len(keys) == index + 1:
            keys.append(self._digest(keys[index] + array("q", tokens).tobytes(), b"block"))
        return Link(keys[index + 1], keys[index], tokens)

    def _digest(self, data: bytes, person: bytes) -> bytes:
        return hashlib.blake2b(data, digest_size=16, key=self._secret, person=person).digest()

    def check(self, sequences: Iterable[Sequence], detached: Iterable[list[list[int]]]) -> None:
        """Assert every invariant, ``sequences`` and ``detached`` holding all tables there are."""
        holders = [seq for seq in sequences if seq.block_tables]
        tables = [seq.block_tables for seq in holders] + [entry for entry in detached if entry]
        assert all(len(entry) == len(self.groups) for entry in tables)
        assert all(len({len(table) for table in entry}) == 1 for entry in tables)
        for index, group in enumerate(self.groups):
            group.check(entry[index] for entry in tables)
        for seq in holders:
            assert len(seq.block_tables[0]) * self.block_size >= seq.num_computed_tokens
            assert seq.num_committed_blocks * self.block_size <= seq.num_computed_tokens
