"""The inference engine: scheduling, the KV cache, models, formats and quantizers."""
