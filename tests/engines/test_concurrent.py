"""Many requests at once: the cache bytes at decode are those at prefill, by hash."""

from __future__ import annotations

from .conftest import Setup
from .models import prompt
from .report import Report, overlap

# One token of cache alone, around the block size (256), several prefill steps. Short ones first: they share a step.
LENGTHS = (2, 17, 33, 64, 100, 255, 256, 257, 258, 400, 511, 513, 900, 1300, 1537, 2049)


def test_sixteen_requests_at_once_arrive_byte_for_byte(hybrid: Setup, report: Report) -> None:
    pair = hybrid.pair
    before = pair.free_blocks()
    transfers = {
        f"mixed-{tokens}": pair.submit(f"mixed-{tokens}", prompt(tokens, 7_000 + tokens), max_tokens=4)
        for tokens in LENGTHS
    }
    assert len(transfers) == 16
    for request in transfers:
        pair.prefill.result(request)
        assert len(pair.decode.result(request).tokens) == 4
    assert pair.free_blocks() == before

    compared = 0
    for request, transfer in transfers.items():
        sent, received = pair.hashes("producer", transfer), pair.hashes("consumer", transfer)
        assert sent, f"prefill wrote no hashes of {request}"
        assert sent == received, f"{request}: cache bytes differ"
        compared += sum(size for _, size in received.values())
    # Every request's cache is different, so equal hashes are about the right request.
    assert len({tuple(sorted(pair.hashes("consumer", t).items())) for t in transfers.values()}) == len(transfers)

    records = [pair.transfer("producer", transfer) for transfer in transfers.values()]
    assert all(record["end"] == "sealed" for record in records)
    most = overlap((record["opened_s"], record["sealed_s"]) for record in records)
    assert most >= 4
    report.row(
        f"{len(LENGTHS)} requests at once, {min(LENGTHS)} to {max(LENGTHS)} tokens",
        f"cache bytes equal by hash ({compared / 1e6:.1f} MB), up to {most} transfers at a time, all blocks free again",
    )
    report.figures["overlap"] = most
