"""One file a vendor API: names, discovery, capabilities, telemetry, isolation, probe."""
