"""What every part uses: errors, files and outputs, locks, provenance, the machine, pieces of text, old names."""
