"""The prefix tree of one namespace: which blocks and states of which key chains are resident.

Nodes are numbers, their properties columns of arrays; a hash table leads from key to node. What a node holds is
kept per *unit*, which is what is evicted together: all full-attention groups are one unit, all recurrent groups
are one (a checkpoint needs every state), every sliding group is its own (windows differ).

Invariants:

* A node with full-attention bytes has a parent with them: leaves go first, and with a full block goes everything else
  its node holds, for it could never be restored.
* An off-grid checkpoint (*tail*) is a node of its own under the block before it; its units come and go together.
* Whoever pins anything of a node pins the full-attention unit of its whole path.

Layers, each on the one before: ``nodes`` (keys and columns), ``residency`` (what is there), ``ranking`` (recency and pins), ``evicting``,
``tree`` (growing and placing). They are one object, since every operation works on the same columns.
"""

from .evicting import Watcher
from .nodes import ROOT, Nodes, Path
from .residency import Residency, Selection
from .tree import Tree

__all__ = ["ROOT", "Nodes", "Path", "Residency", "Selection", "Tree", "Watcher"]
