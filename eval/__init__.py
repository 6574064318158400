"""Programs that measure: parity with golden outputs, latency, quality. They run from a checkout."""
