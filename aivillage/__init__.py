"""AIVillage: a peer-to-peer AI mesh. The map of the house, from the top down.

- `aivillage.cli`        what a person types; speaks to the daemon's control socket.
- `aivillage.node`       the daemon: `node/daemon.py` lists every service in order. Read it first.
- `aivillage.ledger`     who owes whom: one SQLite file, one writer, signed vouchers.
- `aivillage.models`     what a node can do: one folder per power, one file per method.
- `aivillage.protocols`  what peers say to each other, and the rules of saying it. Pure.

Imports go down only: cli -> node -> (ledger | models) -> protocols.
"""

__version__ = "0.1.0"
