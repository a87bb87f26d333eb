"""What a watcher of the index is told adds up to what is resident."""

from kvpool.index import ROOT
from tests.poolkit import LAYOUTS, make_core, store


class Ledger:
    """Keeps what it is told."""

    def __init__(self):
        self.held = set()

    def stored(self, tree, unit, nodes):
        for node in nodes.tolist():
            parent, position = tree.place_of(node)
            assert (parent == ROOT) == (position <= tree.ns.block_tokens)
            entry = (tree.ns.id, unit, tree.key(unit, node))
            assert entry not in self.held
            self.held.add(entry)

    def removed(self, tree, unit, nodes):
        for node in nodes.tolist():
            self.held.remove((tree.ns.id, unit, tree.key(unit, node)))


def test_a_watcher_sees_every_change():
    core = make_core(pages=96)
    core.watcher = ledger = Ledger()
    ns = core.open_namespace("t", LAYOUTS["hybrid"], 16)
    for i in range(30):  # far more than fits: most is evicted again
        store(core, ns, [i] * 70, 70, checkpoints=[32])
        assert len(ledger.held) == core.stat()["entries"]["units"]
    assert sum(core.stat()["evictions"].values())
    core.clear()
    assert not ledger.held
