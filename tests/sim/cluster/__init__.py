"""A whole cluster in one process on a virtual clock: what kvpoold and its clients run, under schedules of faults."""
