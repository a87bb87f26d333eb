"""The picture of one request: each layer's computing and its sending on one axis of time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class LayerTrace:
    """Layers in the order of the model; CLOCK_MONOTONIC seconds. A layer is computed between its predecessor's ``computed_s`` and its
    own; it is sent between its ``computed_s``, when its hook was called, and its ``acked_s``."""

    wire: str
    begin_s: float
    layers: list[str]
    computed_s: list[float]
    acked_s: list[float]
    nbytes: int

    @classmethod
    def of(cls, record: Mapping[str, Any], wire: str) -> Self:
        """From the connector's record of a producer's transfer that one prefill step computed.

        The beginning is not recorded: the first layer is drawn as long as the second.
        """
        layers = record["layers"]
        computed = [float(layer["computed_s"]) for layer in layers]
        return cls(
            wire,
            computed[0] - (computed[1] - computed[0]),
            [str(layer["layer"]) for layer in layers],
            computed,
            [float(layer["acked_s"]) for layer in layers],
            int(record["bytes"]),
        )

    def as_dict(self) -> dict[str, Any]:
        """Seconds from the beginning."""
        return {
            "wire": self.wire,
            "bytes": self.nbytes,
            "computed_s": [round(t - self.begin_s, 4) for t in self.computed_s],
            "acked_s": [round(t - self.begin_s, 4) for t in self.acked_s],
        }


def exposed_s(trace: LayerTrace) -> float:
    """Seconds of sending left when the last layer was computed: what decode waits for."""
    return max(trace.acked_s) - trace.computed_s[-1]


def plot_layers(traces: Sequence[LayerTrace], path: Path) -> Path:
    """One panel a trace: a bar a layer for computing, one for sending; what is left of the line was hidden."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(traces), figsize=(6 * len(traces), 4.2), sharey=True, squeeze=False)
    for axis, trace in zip(axes[0], traces, strict=True):
        begin = trace.begin_s
        starts = [begin, *trace.computed_s[:-1]]
        for i, (start, computed, acked) in enumerate(zip(starts, trace.computed_s, trace.acked_s, strict=True)):
            axis.barh(
                i - 0.2,
                computed - start,
                0.36,
                left=start - begin,
                color="#4477aa",
                label="computed" if not i else None,
            )
            axis.barh(
                i + 0.2,
                acked - computed,
                0.36,
                left=computed - begin,
                color="#ee6677",
                label="computed to acknowledged" if not i else None,
            )
        axis.axvline(
            trace.computed_s[-1] - begin, color="black", linewidth=0.8, linestyle="--", label="last layer computed"
        )
        axis.set_title(f"{trace.wire}: {trace.nbytes / 1e6:.1f} MB, exposed {exposed_s(trace) * 1e3:.0f} ms")
        axis.set_xlabel("seconds")
    axes[0][0].set_ylabel("layer")
    axes[0][0].invert_yaxis()
    axes[0][0].legend(loc="lower left", fontsize=8)
    figure.suptitle("vLLM prefill, one request: what is right of the dashed line is not hidden", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
