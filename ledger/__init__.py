"""Who owes whom: one file, one writer, double entry, signed vouchers."""
