"""What a node can do: one folder per power, one file per method."""
