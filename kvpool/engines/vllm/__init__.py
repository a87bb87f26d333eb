"""vLLM: a KV connector that carries a request's cache from a prefill engine to a decode engine over kvtransport."""
