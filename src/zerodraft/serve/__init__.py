"""An HTTP server in the form of OpenAI's: `zerodraft serve` (needs the `serve` extra)."""
