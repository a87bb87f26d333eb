"""What one seed asks for: sizes, paths, deadlines, faults. Everything random is decided from the seed's generator."""

from __future__ import annotations

import random
from dataclasses import dataclass

from .network import Path

PROFILES = ("calm", "losses", "takeover", "corrupt", "all lost", "cancel", "refuse", "restart", "chaos")

ACTIONS = {
    "calm": (),
    "losses": ("cut one", "cut one", "reset one", "hole one", "stall", "restate"),
    "takeover": ("resume", "resume", "resume", "stall", "pause", "cut one", "restate"),
    "corrupt": ("flip",),
    "all lost": ("cut all", "stall", "unreachable", "restate"),
    "cancel": ("stall", "cut one", "resume", "pause"),
    "refuse": ("stall", "cut one", "restate"),
    "restart": ("restart", "stall"),
    "chaos": (
        "cut one",
        "cut all",
        "reset one",
        "hole one",
        "hole all",
        "stall",
        "pause",
        "flip",
        "resume",
        "restate",
        "restart",
        "unreachable",
    ),
}
CODECS = ("lz4", "zstd")
WORDS = ("right", "nobody", "hole")
MUST_SEAL = frozenset({"calm", "losses", "takeover", "corrupt", "all lost"})
"""Profiles whose faults a transfer has to survive."""


@dataclass(slots=True)
class JobPlan:
    sizes: list[int]
    chunk_bytes: int
    window_bytes: int
    deadline_s: float
    receiver_deadline_s: float
    from_dialler: bool
    """Whether the side that dialled produces."""
    expect_after_s: float | None
    """None: nobody ever expects it."""
    open_after_s: float
    refuse: str = ""
    """"grant" or "seal": what the consumer refuses."""
    cancel_after_s: float | None = None
    cancel_by: str = "producer"
    hand_over_pause_s: float = 0.0
    checksum: bool = True


@dataclass(slots=True)
class Plan:
    seed: int
    profile: str
    path: Path
    connections: int
    jobs: list[JobPlan]
    faults: list[tuple[float, str]]
    spill_pages: int
    spill_fails: bool
    executor_s: float
    calls: int
    codec: str
    """What every chunk that shrinks by it is coded with; "": nothing is coded."""
    advertise: str
    """The dialling side's word of where it is reached: "right", "nobody" listens there, "hole"; "": it says none."""
    whole_bytes: int
    """Transfers up to this size travel in their OPEN."""

    @property
    def must_seal(self) -> bool:
        return self.profile in MUST_SEAL


def make_plan(seed: int, rng: random.Random) -> Plan:
    profile = rng.choice(PROFILES)
    must_seal = profile in MUST_SEAL
    path = Path(
        latency_s=rng.choice((0.0002, 0.002, 0.02)),
        jitter_s=rng.choice((0.0, 0.005)),
        bytes_per_s=rng.choice((5e4, 2e5, 2e6)),
        capacity=rng.choice((700, 3 << 10, 16 << 10)),
        packet=rng.choice((500, 1500, 4 << 10)),
    )
    jobs = [_job(profile, rng, must_seal) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    total = sum(sum(job.sizes) for job in jobs)
    span = 0.02 + 1.5 * total / path.bytes_per_s
    actions = ACTIONS[profile]
    count = 0 if not actions else 1 if profile == "corrupt" else rng.randint(1, 6)
    faults = sorted((rng.random() * span, rng.choice(actions)) for _ in range(count))
    return Plan(
        seed=seed,
        profile=profile,
        path=path,
        connections=rng.randint(1, 4),
        jobs=jobs,
        faults=faults,
        spill_pages=rng.choice((0, 1, 4)),
        spill_fails=not must_seal and rng.random() < 0.2,
        executor_s=rng.choice((0.0, 0.001, 0.03)),
        calls=rng.choice((0, 0, 2, 5)),
        # By the number and not by the generator: all else is as it is without them.
        codec=CODECS[seed // 4 % 2] if seed % 4 == 3 else "",
        advertise=WORDS[seed // 8 % 3] if seed % 8 in (0, 7) else "",
        whole_bytes=1 << 17 if seed % 3 == 2 else 0,
    )


def _job(profile: str, rng: random.Random, must_seal: bool) -> JobPlan:
    job = JobPlan(
        sizes=[rng.choice((0, 1, 100, 3000, 9000, 20_000)) for _ in range(rng.randint(1, 5))],
        chunk_bytes=rng.choice((700, 2000, 6000)),
        window_bytes=rng.choice((1000, 5000, 20_000, 1 << 20)),
        deadline_s=60.0 if must_seal else rng.choice((0.3, 2.0, 20.0)),
        receiver_deadline_s=60.0 if must_seal else rng.choice((0.3, 2.0, 20.0)),
        from_dialler=rng.random() < 0.6,
        expect_after_s=rng.choice((0.0, 0.0, 0.02, 0.4)),
        open_after_s=rng.choice((0.0, 0.0, 0.02)),
        hand_over_pause_s=rng.choice((0.0, 0.0, 0.01)),
        checksum=rng.random() < 0.9 or profile in ("corrupt", "chaos"),
    )
    if profile == "refuse" or (profile == "chaos" and rng.random() < 0.1):
        kind = rng.choice(("never", "grant", "seal"))
        if kind == "never":
            job.expect_after_s = None
        else:
            job.refuse = kind
    if profile == "cancel" or (profile == "chaos" and rng.random() < 0.2):
        job.cancel_after_s = rng.choice((0.0, 0.01, 0.05, 0.2, 0.6))
        job.cancel_by = rng.choice(("producer", "consumer"))
    return job
