"""The world outside: models, text, calibration and evaluation."""
