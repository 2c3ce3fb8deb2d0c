"""libp2p, fenced: the only package that imports it, and its in-memory twin."""
