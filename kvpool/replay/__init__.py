"""Request traces through the real index and policies, without payload: ``kvpool replay``."""
