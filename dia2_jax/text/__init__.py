"""What is known about text before a network runs: tokens, scripts, timing, the machine."""
