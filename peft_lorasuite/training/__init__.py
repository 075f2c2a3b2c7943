"""Fine-tuning, distillation and scoring."""
