"""What every part uses: errors, reading and writing files, locks."""
