"""The paper's benchmarks: items, answers, scores, tables."""
