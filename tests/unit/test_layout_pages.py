"""Groups whose KV travels in whole pages."""

from __future__ import annotations

import pytest

from kvtransport.errors import LayoutError, ManifestError
from kvtransport.layout import CacheGroup, CacheLayout, GroupKind, Span, TensorSpec
from kvtransport.manifest import Manifest

KV = (TensorSpec("kv", "bfloat16", (2, 8)),)


def layout(page: int = 16, window: int = 40) -> CacheLayout:
    return CacheLayout(
        "paged",
        (
            CacheGroup("full", GroupKind.FULL, (0,), KV, page_tokens=page),
            CacheGroup("window", GroupKind.SLIDING, (1,), KV, window, page_tokens=page),
            CacheGroup("state", GroupKind.RECURRENT, (2,), (TensorSpec("s", "float32", (5,)),)),
        ),
    )


def spans(boundary: int, **kwargs) -> list[tuple[Span, ...]]:
    return [e.spans for e in layout().extents(boundary, **kwargs)]


def test_both_ends_are_rounded_outwards_and_states_keep_their_position():
    assert spans(99) == [(Span(0, 112),), (Span(48, 64),), (Span(99, 0),)]
    assert spans(112) == [(Span(0, 112),), (Span(64, 48),), (Span(112, 0),)]
    assert spans(99, start=33)[0] == (Span(32, 80),)
    assert spans(5) == [(Span(0, 16),), (Span(0, 16),), (Span(5, 0),)]


def test_windows_of_checkpoints_that_touch_after_rounding_are_joined():
    assert spans(200, checkpoints=[90])[1] == (Span(48, 48), Span(160, 48))
    assert spans(140, checkpoints=[95])[1] == (Span(48, 96),)


@pytest.mark.parametrize("boundary", range(1, 70))
def test_pages_cover_the_window_and_nothing_more_than_a_page_on_each_side(boundary):
    (window,) = layout().extents(boundary)[1].spans
    needed = max(0, boundary - 39)
    assert window.first <= needed < window.first + 16
    assert boundary <= window.stop < boundary + 16


def test_the_consumer_checks_manifests_against_its_own_pages():
    manifest = Manifest.of_layout(layout(), 99, transfer=bytes(16))
    manifest = Manifest.decode(manifest.encode())
    manifest.check(layout())
    assert manifest.total_bytes == 112 * 32 + 64 * 32 + 20
    exact = CacheLayout(
        "paged", tuple(CacheGroup(g.name, g.kind, g.layers, g.tensors, g.window) for g in layout().groups)
    )
    assert exact.fingerprint() != layout().fingerprint()
    other = Manifest(
        manifest.transfer, layout().fingerprint(), 99, Manifest.of_layout(exact, 99, transfer=bytes(16)).extents
    )
    with pytest.raises(ManifestError, match=r"layer 0 tensor 0 holds tokens 0\.\.99, the layout needs tokens 0\.\.112"):
        other.check(layout())


def test_descriptions_carry_pages_and_fingerprints_without_pages_are_what_they_were():
    assert CacheLayout.from_description(layout().describe()) == layout()
    assert "page_tokens" not in layout(page=1).describe()["groups"][0]


@pytest.mark.parametrize("kind", [GroupKind.FULL, GroupKind.RECURRENT])
def test_impossible_pages_are_refused(kind):
    with pytest.raises(LayoutError, match="pages of"):
        CacheGroup("g", kind, (0,), KV, page_tokens=0 if kind is GroupKind.FULL else 16)
