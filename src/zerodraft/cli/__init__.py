"""The `zerodraft` command: one thin file a command. Nothing here imports torch until a command runs."""
