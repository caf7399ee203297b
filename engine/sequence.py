"""One sequence's state in the engine: its tokens, how far they are computed, and its blocks."""

from collections.abc import Sequence as Seq

from .plan import PENDING
from .records import EngineRequest, FinishReason, TokenLogprobs


class Sequence:
    """One living request.

    ``token_ids`` holds prompt and output; tokens that a step in flight is still sampling stand in it as
    PENDING. ``num_computed_tokens`` counts what has been computed or planned: there is no other phase than
    this number catching up with ``num_target_tokens``. ``block_tables`` belongs to the block manager.
    """

    __slots__ = (
        "_frozen_tables",
        "added_at",
        "announced",
        "block_keys",
        "block_tables",
        "compute_limit",
        "in_flight",
        "last_step",
        "max_output_tokens",
        "num_cached_tokens",
        "num_committed_blocks",
        "num_computed_tokens",
        "num_discards",
        "num_matched_blocks",
        "num_prompt_tokens",
        "prompt_logprobs",
        "queued_seconds",
        "request",
        "seq_id",
        "stop_ids",
        "token_ids",
    )

    def __init__(self, seq_id: int, request: EngineRequest, max_model_len: int, eos: Seq[int], now: float):
        """``seq_id`` grows with the order of arrival. ``now``: when the request came, in seconds."""
        params = request.params
        self.seq_id = seq_id
        self.request = request
        self.token_ids = list(request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.max_output_tokens = min(params.max_tokens, max_model_len - self.num_prompt_tokens)
        # The last token of all is only wanted, never needed: nothing is predicted from it.
        self.compute_limit = self.num_prompt_tokens + self.max_output_tokens - 1
        self.stop_ids = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else eos)
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.prompt_logprobs: list[TokenLogprobs] | None = None if params.prompt_logprobs is None else []
        self.added_at = now
        self.queued_seconds: float | None = None  # None: not scheduled yet
        self.announced = False  # the runner knows it
        self.in_flight = 0  # steps planned and not yet ended
        self.num_discards = 0  # of these, the next ones whose output is void
        self.last_step = -1
        self.block_tables: list[list[int]] = []  # per KV group; empty: holds nothing
        self.block_keys: list[bytes] = []
        self.num_committed_blocks = 0
        self.num_matched_blocks = 0  # that the last look into the prefix cache found
        self._frozen_tables: tuple[tuple[int, ...], ...] = ()

    @property
    def num_tokens(self) -> int:
        """Prompt and output, PENDING ones included."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Output tokens, PENDING ones included."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_target_tokens(self) -> int:
        """How many of its tokens must be computed as far as is known now."""
        return min(len(self.token_ids), self.compute_limit)

    @property
    def reads_cache(self) -> bool:
        """Whether it may start from cached blocks: log-probabilities of the prompt need every position."""
        return self.request.params.prompt_logprobs is None

    def freeze_tables(self, num_blocks: int) -> tuple[tuple[int, ...], ...]:
        """The first ``num_blocks`` of each block table; copied only when that number changed."""
        frozen = self._frozen_tables
        if not frozen or len(frozen[0]) != num_blocks:
            frozen = self._frozen_tables = tuple(tuple(table[:num_blocks]) for table in self.block_tables)
        return frozen

    def detach_tables(self) -> list[list[int]]:
        """Give up the blocks: the caller frees them. Everything is to be computed again."""
        tables = self.block_tables
        self.block_tables = []
        self.num_computed_tokens = 0
        self._frozen_tables = ()
        return tables

    def accept(
        self, position: int, sampled: tuple[int, ...]
    ) -> tuple[list[int], FinishReason | None, int | None]:
        """Put what a step sampled in place of the PENDING token at ``position``.

        Returns the tokens that count, the reason to finish and the id that stopped it. Where a step found
        other than one token, steps planned meanwhile stood on a wrong guess: their output is discarded
        and ``num_computed_tokens`` steps back.
        """
        assert self.token_ids[position] == PENDING
        last = self.num_prompt_tokens + self.max_output_tokens
        kept: list[int] = []
        for token in sampled:
            if token in self.stop_ids:
                return kept, "stop", token
            kept.append(token)
            if position + len(kept) == last:
                return kept, "length", None
        if len(kept) == 1:
            self.token_ids[position] = kept[0]
        else:
            self.token_ids[position:] = kept
            self.num_computed_tokens = min(self.num_computed_tokens, position, len(self.token_ids) - 1)
            self.num_discards = self.in_flight
        return kept, None, None
