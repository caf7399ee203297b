"""Admission: how much may wait for the engine. A permit lives as long as its request."""

from ..engine.errors import OverloadedError, RequestError


class Admission:
    """Counts admitted sequences that have not ended, and prompt tokens that wait for their first output.

    As many sequences as the engine runs at once, plus ``max_queued_requests``, may be inside.
    """

    def __init__(self, max_running: int, max_queued_requests: int, max_queued_tokens: int) -> None:
        self.capacity = max_running + max_queued_requests
        self.max_queued_tokens = max_queued_tokens
        self.requests = 0  # HTTP requests inside
        self.sequences = 0
        self.waiting_tokens = 0

    @property
    def full(self) -> bool:
        """Whether one more sequence would be refused."""
        return self.sequences >= self.capacity or self.waiting_tokens >= self.max_queued_tokens

    def check(self) -> None:
        """Refuse early, before a prompt is even tokenized. Errors: OverloadedError."""
        if self.full:
            raise self._overloaded()

    def admit(self, prompt_lengths: list[int]) -> "Permit":
        """Let one request's sequences in. Errors: OverloadedError; RequestError if they could never fit."""
        count, tokens = len(prompt_lengths), sum(prompt_lengths)
        if count > self.capacity:
            raise RequestError(
                f"{count} sequences (prompts x n) exceed what this server holds at once ({self.capacity}); "
                "split the request",
                param="n",
            )
        too_many = self.sequences + count > self.capacity
        # A request is not refused for its own size alone, or it could never be served.
        too_long = self.waiting_tokens > 0 and self.waiting_tokens + tokens > self.max_queued_tokens
        if too_many or too_long:
            raise self._overloaded()
        return Permit(self, prompt_lengths)

    def _overloaded(self) -> OverloadedError:
        return OverloadedError(
            f"the queue is full ({self.sequences} sequences, {self.waiting_tokens} prompt tokens waiting); "
            "try again later"
        )


class Permit:
    """The room that one request takes. ``close`` gives back what is left of it; closing twice is harmless."""

    def __init__(self, admission: Admission, prompt_lengths: list[int]) -> None:
        self._admission = admission
        self._waiting = dict(enumerate(prompt_lengths))
        self._running = len(prompt_lengths)
        admission.requests += 1
        admission.sequences += self._running
        admission.waiting_tokens += sum(prompt_lengths)

    def started(self, index: int) -> None:
        """Sequence ``index`` has its first output: its prompt waits no more."""
        self._admission.waiting_tokens -= self._waiting.pop(index, 0)

    def ended(self, index: int) -> None:
        """Sequence ``index`` is over."""
        self.started(index)
        self._running -= 1
        self._admission.sequences -= 1

    def close(self) -> None:
        """The request is over."""
        if self._running < 0:
            return
        self._admission.requests -= 1
        self._admission.sequences -= self._running
        self._admission.waiting_tokens -= sum(self._waiting.values())
        self._waiting.clear()
        self._running = -1
