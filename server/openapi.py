"""The requests' JSON schemas for /openapi.json."""

from typing import Any

from pydantic import BaseModel


def request_schema(body: type[BaseModel]) -> dict[str, Any]:
    """OpenAPI's requestBody of a model, without references: each body stands for itself."""
    schema = body.model_json_schema()
    definitions = schema.pop("$defs", {})
    return {"required": True, "content": {"application/json": {"schema": _inline(schema, definitions)}}}


def _inline(node: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_inline(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _inline(definitions[node["$ref"].rpartition("/")[2]], definitions)
    return {key: _inline(value, definitions) for key, value in node.items()}
