"""The looped model: configuration, cycles, zero tokens, early exit, conversion, calibration."""
