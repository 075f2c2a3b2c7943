"""The benchmarks of the LoRASuite paper, run by lm-evaluation-harness."""
