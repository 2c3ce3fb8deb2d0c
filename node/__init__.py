"""The daemon that joins transport, ledger and modules. Read `daemon.py` first."""
