"""The benchmarks of the LoRASuite paper, on lm-evaluation-harness."""
