"""The exact part of DiffuSpec: lattices, path search, draft length, verification and the loop that joins them."""
