"""What lossless coding makes of cache bytes, and what it costs: ``python benchmarks/codecs.py [--json PATH]``.

Normal bfloat16 data, and the caches of tiny models with random weights, prefilled here (their bfloat16 tensors; float32
states are not coded). Chunks of 1 MiB or what a tensor has; one core; medians of the best of five. The break-even is the
payload rate of a link below which coding promises 1.1 times the goodput (kvtransport.flow.coding), one core coding.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np
from codecs_data import caches, normal

from kvtransport.buffers import PageList, join_planes, split_planes
from kvtransport.compression import Codec, available, decode, encode
from kvtransport.flow.coding import MARGIN

CHUNK = 1 << 20
GBPS = 8 / 1e9


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
