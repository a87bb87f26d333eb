"""KVCache transport: layer by layer, over many TCP connections, verified; see docs/design.md."""

from . import presets
from .buffers import Arena, PageList, native_available
from .endpoint import Endpoint, EndpointConfig
from .errors import KVError
from .flow.spilling import SpillPolicy, WhenFull
from .layout import CacheGroup, CacheLayout, Extent, GroupKind, Span, TensorSpec
from .link import Link
from .manifest import Manifest, new_transfer_id
from .receiver import Expectation, Receiver
from .sender import Sender
from .telemetry import LinkTelemetry
from .transfer import Handover, IncomingTransfer, OutgoingTransfer, TransferStats

__all__ = [
    "Arena",
    "CacheGroup",
    "CacheLayout",
    "Endpoint",
    "EndpointConfig",
    "Expectation",
    "Extent",
    "GroupKind",
    "Handover",
    "IncomingTransfer",
    "KVError",
    "Link",
    "LinkTelemetry",
    "Manifest",
    "OutgoingTransfer",
    "PageList",
    "Receiver",
    "Sender",
    "Span",
    "SpillPolicy",
    "TensorSpec",
    "TransferStats",
    "WhenFull",
    "native_available",
    "new_transfer_id",
    "presets",
]
