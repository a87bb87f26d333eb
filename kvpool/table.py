"""The index's hash table and many flat keys at once: ``kvpool._native``, or its pure-Python twin where that was not built."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from kvtransport.errors import ConfigError

if TYPE_CHECKING:
    from ._native import KeyTable, ancestors, cut_keys, flags, pack_keys, which
else:
    try:
        from ._native import KeyTable, ancestors, cut_keys, flags, pack_keys, which
    except ImportError as error:
        if os.environ.get("KVTRANSPORT_REQUIRE_NATIVE") == "1":
            raise ConfigError(
                f"KVTRANSPORT_REQUIRE_NATIVE=1, but kvpool._native cannot be imported ({error}): install a C compiler and "
                "Python's headers (gcc, python3-dev), then reinstall or run 'python setup.py build_ext --inplace'; or unset "
                "the variable to use the slower pure-Python twin"
            ) from error
        from ._pure_table import KeyTable, ancestors, cut_keys, flags, pack_keys, which

__all__ = ["KeyTable", "ancestors", "cut_keys", "flags", "new_table", "pack_keys", "which"]


def new_table() -> KeyTable:
    """An empty table under a seed of its own: tenants choose keys, and could otherwise choose ones that collide."""
    return KeyTable(int.from_bytes(os.urandom(8), "little"))
