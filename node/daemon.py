"""Read this file first: every service of the node, in the order in which it starts."""

from __future__ import annotations
