"""POST /tokenize and /detokenize, as vLLM has them."""

from typing import Any

from .chat import render
from .models import ModelTable
from .sampling import check_token_ids
from .schemas import TokenizeChatBody, detokenize_body, tokenize_body


async def tokenize(fields: dict[str, Any], models: ModelTable) -> dict[str, Any]:
    """Token ids of a text, or of messages. Errors: RequestError, NotFoundError, pydantic.ValidationError."""
    body = tokenize_body(fields)
    model = models.get(body.model)
    text = await render(body, model) if isinstance(body, TokenizeChatBody) else body.prompt
    token_ids = await model.tokenizer.encode_async(text, body.add_special_tokens)
    strings = [model.tokenizer.token(token_id) for token_id in token_ids] if body.return_token_strs else None
    return {
        "count": len(token_ids),
        "max_model_len": model.max_model_len,
        "tokens": token_ids,
        "token_strs": strings,
    }


def tokenizer_info(models: ModelTable) -> dict[str, str]:
    """What remote tokenizers (lm-eval's) ask for: the special tokens by name."""
    return {"tokenizer_class": "PreTrainedTokenizerFast", **models.get(None).tokenizer.special_tokens}


def detokenize(fields: dict[str, Any], models: ModelTable) -> dict[str, Any]:
    """The text of token ids. Errors: RequestError, NotFoundError, pydantic.ValidationError."""
    body = detokenize_body(fields)
    model = models.get(body.model)
    check_token_ids(body.tokens, model.tokenizer.vocab_size, "tokens")
    return {"prompt": model.tokenizer.decode(body.tokens, skip_special_tokens=False)}
