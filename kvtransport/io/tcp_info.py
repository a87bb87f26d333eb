"""What the kernel knows of a TCP connection (``struct tcp_info``, linux/tcp.h)."""

from __future__ import annotations

import struct

from ..flow.telemetry import PathInfo

BYTES = 232
_WORDS = struct.Struct("<8B24I")  # flags and bytes, then 32-bit words: rto is the first, total_retrans the 24th
_LONGS = struct.Struct("<4Q6I4Q2I2Q")  # pacing_rate to bytes_retrans
_AT = 104


def parse(info: bytes) -> PathInfo | None:
    """From the bytes of TCP_INFO; None where the kernel is too old to tell how many were sent again (before 4.19)."""
    if len(info) < _AT + _LONGS.size:
        return None
    words = _WORDS.unpack_from(info)
    longs = _LONGS.unpack_from(info, _AT)
    # wscale and flags: bit 0 of the eighth byte is delivery_rate_app_limited
    mss, rtt, cwnd = words[8 + 2], words[8 + 15], words[8 + 18]
    notsent, min_rtt = longs[6], longs[7]
    rate, busy, receiver, sender_buffer = longs[10:14]
    sent, resent = longs[16:18]
    return PathInfo(
        rtt_s=rtt / 1e6,
        min_rtt_s=min_rtt / 1e6 if min_rtt not in (0, 0xFFFFFFFF) else rtt / 1e6,
        delivery_rate=float(rate),
        app_limited=bool(words[7] & 1),
        window_bytes=cwnd * mss,
        notsent_bytes=notsent,
        sent_bytes=sent,
        resent_bytes=resent,
        busy_s=busy / 1e6,
        receiver_limited_s=receiver / 1e6,
        buffer_limited_s=sender_buffer / 1e6,
    )
