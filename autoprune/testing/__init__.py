"""Contract tests and problems with known answers, for this project and for third parties."""
