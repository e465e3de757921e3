"""What runs took: the device's time, by model and kind of prompt."""
