"""The simulator: discrete events, seeded, around the same router, window and rebalancer that serve live."""
