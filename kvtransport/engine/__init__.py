"""What moves chunks: the native I/O engine, and its twin in Python for any other byte stream (``base`` has the contract)."""
