"""The wire protocol without I/O: frames, typed bodies, received ranges, state tables. See docs/wire-format.md."""
