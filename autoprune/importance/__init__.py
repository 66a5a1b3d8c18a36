"""Importance of units, measured on calibration data."""
