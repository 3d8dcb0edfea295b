"""What the three engines share: the device thread, admission, sessions, budgets. Knows no gRPC and no network."""
