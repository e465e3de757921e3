"""Past runs and the device time they took, by model and kind of prompt."""
