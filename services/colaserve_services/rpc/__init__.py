"""What every service shares at its edge: errors, arrays, settings, metrics, logs, server, channels."""
