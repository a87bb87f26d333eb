"""The installed vLLM's connector interface is the one the connector was written for."""

from __future__ import annotations
