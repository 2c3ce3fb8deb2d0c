"""Models on this machine: where they come from, what is in them, whether they are whole."""
