"""From a validated body to the engine's SamplingParams: defaults, limits, what only the model can tell."""

from dataclasses import replace

from ..engine.errors import RequestError
from ..engine.records import SamplingParams
from .errors import ContextLengthError
from .models import ServedModel
from .schemas import GenerationBody

DEFAULT_COMPLETION_TOKENS = 16
_INT64 = 2**64


def sampling_params(body: GenerationBody, model: ServedModel, num_logprobs: int | None) -> SamplingParams:
    """All but ``max_tokens``, which depends on the prompt. Errors: RequestError; EngineError if not ready."""
    vocab_size = model.info.vocab_size
    for name, ids in (("logit_bias", body.logit_bias), ("stop_token_ids", body.stop_token_ids)):
        check_token_ids(list(ids), vocab_size, name)
    defaults = model.sampling_defaults
    top_k = int(_first(body.top_k, defaults.get("top_k"), 0))
    return SamplingParams(
        max_tokens=1,
        temperature=_first(body.temperature, defaults.get("temperature"), 1.0),
        top_p=_first(body.top_p, defaults.get("top_p"), 1.0),
        top_k=0 if top_k <= 0 else min(top_k, vocab_size),
        min_p=_first(body.min_p, defaults.get("min_p"), 0.0),
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=_first(body.repetition_penalty, defaults.get("repetition_penalty"), 1.0),
        logit_bias=body.logit_bias,
        min_tokens=body.min_tokens,
        ignore_eos=body.ignore_eos,
        stop_token_ids=tuple(dict.fromkeys(body.stop_token_ids)),
        seed=body.seed,
        logprobs=num_logprobs,
    )


def check_token_ids(ids: list[int], vocab_size: int, param: str) -> None:
    """Errors: RequestError for an id that the model does not have."""
    worst = max(ids, default=0)
    if worst >= vocab_size:
        raise RequestError(
            f"'{param}': token id {worst} does not exist; the model's ids are 0 to {vocab_size - 1}",
            param=param,
        )


def output_limit(
    requested: int | None, default: int | None, num_prompt_tokens: int, model: ServedModel
) -> int:
    """``max_tokens`` of one prompt: as requested, else ``default``, else what is left of the context.

    Errors: ContextLengthError where prompt and output do not fit.
    """
    longest = model.max_model_len
    left = longest - num_prompt_tokens
    needed = 1 if requested is None else max(requested, 1)
    if left < needed:
        asked = "" if requested is None else f" and max_tokens asks for {requested} more"
        raise ContextLengthError(
            f"the model's context is {longest} tokens, but the prompt has {num_prompt_tokens}{asked}; "
            f"shorten the prompt{'' if requested is None or left < 1 else ' or lower max_tokens'}",
            param="prompt" if requested is None or left < 1 else "max_tokens",
        )
    if requested is not None:
        return requested
    return left if default is None else min(default, left)


def for_sequence(params: SamplingParams, max_tokens: int, copy: int) -> SamplingParams:
    """``params`` of the ``copy``-th of n sequences: each has a seed of its own, or all would say the same."""
    if params.min_tokens > max_tokens:
        raise RequestError(
            f"'min_tokens' {params.min_tokens} exceeds max_tokens {max_tokens}; lower it", param="min_tokens"
        )
    seed = params.seed
    if seed is not None and copy:
        seed = (seed + copy + 2**63) % _INT64 - 2**63
    return replace(params, max_tokens=max_tokens, seed=seed)


def _first(given: float | None, default: float | None, otherwise: float) -> float:
    if given is not None:
        return given
    return otherwise if default is None else default
