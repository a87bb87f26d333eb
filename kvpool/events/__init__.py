"""What is stored and removed, told in the field's shape: KV cache events over ZeroMQ, as vLLM and SGLang publish them.

Ours go out (:mod:`.log`, :mod:`.publisher`); an engine's come in (:mod:`.subscriber`) and say what it holds (:mod:`.engine`).
"""
