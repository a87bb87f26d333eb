"""What lossless coding makes of cache bytes, and what it costs: ``python benchmarks/codecs.py [--json PATH]``.

Normal bfloat16 data, and the caches of tiny models with random weights, prefilled here (their bfloat16 tensors; float32
states are not coded). Chunks of 1 MiB or what a tensor has; one core; medians of the best of five. The break-even is the
payload rate of a link below which coding promises 1.1 times the goodput (kvtransport.flow.coding), one core coding.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict

import numpy as np

from kvtransport.buffers import PageList, join_planes, split_planes
from kvtransport.compression import Codec, available, decode, encode
from kvtransport.flow.coding import MARGIN

CHUNK = 1 << 20
MODELS = ("kimi_linear", "qwen3_next", "gemma3", "falcon_h1")
GBPS = 8 / 1e9


def normal(nbytes: int) -> np.ndarray:
    values = np.random.default_rng(7).standard_normal(nbytes // 2).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)


def caches(tokens: int) -> dict[str, list[np.ndarray]]:
    """The bfloat16 bytes of each model's cache after a prefill of random tokens, tensor by tensor."""
    from kvpool.engines.tiny_models import load_tiny, random_tokens, save_tiny
    from kvpool.engines.transformers import PrefillRun, layout_of

    found: dict[str, list[np.ndarray]] = {}
    for name in MODELS:
        with tempfile.TemporaryDirectory() as directory:
            model = load_tiny(save_tiny(name, directory))
        layout = layout_of(model)
        slots = {(s.layer, s.tensor): s for s in layout.slots()}
        parts: dict[tuple[int, int], list[bytes]] = defaultdict(list)

        def keep(layer: int, tensor: int, data: memoryview, first: int, count: int, slots=slots, parts=parts) -> None:
            if slots[layer, tensor].spec.dtype == "bfloat16":
                parts[layer, tensor].append(bytes(data))

        PrefillRun(model, layout, random_tokens(tokens, 3), on_unit=keep).run()
        found[name] = [np.frombuffer(b"".join(data), np.uint8) for data in parts.values()]
    return found


def best(work, *args) -> float:
    seconds = []
    for _ in range(5):
        then = time.perf_counter()
        work(*args)
        seconds.append(time.perf_counter() - then)
    return min(seconds)


def measure(tensors: list[np.ndarray], codec: Codec) -> dict[str, float]:
    raw = coded_bytes = 0
    encoding, decoding = [], []
    for data in tensors:
        for at in range(0, len(data), CHUNK):
            pages = PageList.of(np.ascontiguousarray(data[at : at + CHUNK]))
            coded = encode(pages, codec)
            raw += pages.nbytes
            coded_bytes += pages.nbytes if coded is None else len(coded)
            encoding.append(pages.nbytes / best(encode, pages, codec))
            if coded is not None:
                decoding.append(pages.nbytes / best(decode, coded))
                assert decode(coded) == pages.tobytes()
    rate, ratio = statistics.median(encoding), raw / coded_bytes
    return {
        "bytes": raw,
        "ratio": ratio,
        "encode_gb_s": rate / 1e9,
        "decode_gb_s": statistics.median(decoding) / 1e9 if decoding else 0.0,
        "pays_below_gbps": rate / MARGIN * GBPS if ratio > MARGIN else 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json")
    parser.add_argument("--tokens", type=int, default=4096)
    args = parser.parse_args()
    data = {"normal": [normal(16 << 20)], **caches(args.tokens)}
    planes = [bytearray(CHUNK // 2) for _ in range(2)]
    block = data["normal"][0][:CHUNK].copy()
    body: dict[str, object] = {
        "split_gb_s": CHUNK / best(split_planes, block, None, *planes) / 1e9,
        "join_gb_s": CHUNK / best(join_planes, block, None, *planes) / 1e9,
    }
    print(f"planes: split {body['split_gb_s']:.1f}, join {body['join_gb_s']:.1f} GB/s")
    for name, tensors in data.items():
        body[name] = {}
        for codec in available()[1:]:
            found = body[name][codec.name.lower()] = measure(tensors, codec)
            print(
                f"{name:12} {codec.name:5} {found['bytes'] / 1e6:7.1f} MB  ratio {found['ratio']:.3f}  "
                f"encode {found['encode_gb_s']:.2f}  decode {found['decode_gb_s']:.2f} GB/s  "
                f"pays below {found['pays_below_gbps']:.1f} Gbps"
            )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(body, file, indent=2)


if __name__ == "__main__":
    main()
