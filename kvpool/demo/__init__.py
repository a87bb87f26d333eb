"""``kvpool demo``: prefill, pool and decode as real processes on loopback. Nothing else imports this package."""
