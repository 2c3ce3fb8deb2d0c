"""Text generation: the operation, the engine port and the torch engine."""
