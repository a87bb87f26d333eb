"""Many nodes and clusters, one cache: membership, placement, directory, and the client over them.

Policy (``members``, ``placement``, ``segments``, ``entries``, ``cut``, ``locate``, ``announcing``) imports no clock, no randomness and no
sockets; the rest does the I/O around it.
"""
